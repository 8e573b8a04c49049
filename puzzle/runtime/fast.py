"""The runtime on our kernels: paged caches, and a step as one CUDA graph.

Letters: B batch, T prompt tokens, D head_dim, R rotary dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from puzzle.base.ranks import Ranks
from puzzle.base.workload import PAGE, PREFILL_ROWS
from puzzle.blocklib.fast.batch import Fast, RopeTable, Stream, Tables, make_fast, new_batch, num_pages
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.sub_block import SubBlock
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.swiglu import linear
from puzzle.kernels.timer import Graph
from puzzle.parents.structure import Structure
from puzzle.runtime.interface import Fp8, Runtime, check_lengths
from puzzle.runtime.model import CausalModel, embed
from puzzle.runtime.parallel import among_own_rows, best_word


def rope_tables(structure: Structure, sub_blocks: list[SubBlock], length: int, device: torch.device | str) -> Tables:
    """The tables that these sub-blocks ask for, of whole pages of positions; over whole heads, as the kernels want them."""
    positions = num_pages(length) * PAGE
    found: dict[str | None, RopeTable] = {}
    for sub_block in sub_blocks:
        if not isinstance(sub_block, Gqa) or sub_block.rope in found:
            continue
        dim = sub_block.head_dim
        if sub_block.rope is None:
            cos, sin = torch.ones(positions, dim, device=device), torch.zeros(positions, dim, device=device)
            found[None] = RopeTable(cos=cos, sin=sin, rotary_dim=dim)
            continue
        rope = structure.ropes[sub_block.rope]
        cos, sin = rope.tables_of(positions, length, device)
        if rope.rotary_dim < dim:
            stay = (dim - rope.rotary_dim) // 2
            ones, zeros = cos.new_ones(positions, stay), sin.new_zeros(positions, stay)
            half = rope.rotary_dim // 2
            cos = torch.cat((cos[:, :half], ones, cos[:, half:], ones), dim=1)
            sin = torch.cat((sin[:, :half], zeros, sin[:, half:], zeros), dim=1)
        found[sub_block.rope] = RopeTable(cos=cos, sin=sin, rotary_dim=rope.rotary_dim)
    return found


class FastRuntime(Runtime):
    """The sub-blocks of `model` on our kernels, for up to `max_length` tokens of each of `batch` sequences.

    fp8: weights of sub-blocks and caches in float8_e4m3fn, all of them or some. consume: take the sub-blocks out of the model, so that no weight
    is held twice; the model is used up then. ranks: the model is one rank's share (`Structure.share`) of a whole one.
    """

    def __init__(
        self,
        model: CausalModel,
        batch: int,
        max_length: int,
        *,
        fp8: bool | Fp8 = False,
        consume: bool = False,
        ranks: Ranks | None = None,
    ):
        self.structure, self.max_length, self.ranks = model.structure, max_length, ranks
        self.embedding, self.head = model.embedding.weight.data, model.head_weight.data
        self.final_norm, self.device = model.norm.weight.data, model.embedding.weight.device
        if self.structure.norm_offset:
            self.final_norm = (1 + self.final_norm.float()).to(self.final_norm.dtype)
        self.vocab_size = len(self.embedding) * (1 if ranks is None else ranks.world)
        self.weight_bytes = model.weight_bytes
        waiting = list(model.parts())
        tables = rope_tables(self.structure, [part.sub_block for _, _, part in waiting], max_length, self.device)
        self.batch = new_batch(batch, max_length, tables, self.device, fp8 is True)
        self.batch.ranks = ranks
        if isinstance(fp8, Fp8):
            self.batch.fp8_cache = fp8.cache
        if consume:
            model.blocks = torch.nn.ModuleList()

        def make(layer: int, slot: str, part: Part) -> Fast | None:
            own = fp8 if isinstance(fp8, bool) else (layer, slot) in fp8.weights
            return make_fast(part, replace(self.batch, fp8=own))

        made = [make(*waiting.pop(0)) for _ in range(len(waiting))]
        self.parts: list[Fast] = [part for part in made if part is not None]
        self.ids = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.unused = torch.zeros_like(self.ids)  # what `step_again` chose

    @property
    def state_bytes(self) -> int:
        return sum(part.state_bytes for part in self.parts)

    def agreed(self, prefill: float, decode: float) -> tuple[float, float]:
        """Of the slowest rank."""
        if self.ranks is None:
            return prefill, decode
        first, rest = self.ranks.slowest([prefill, decode])
        return first, rest

    def randomize(self) -> None:
        """Noise in all that is kept, and other tokens in hand for every sequence: of alike ones a mixture would need few experts."""
        for part in self.parts:
            part.randomize()
        noise = torch.Generator().manual_seed(0)  # the same in every rank
        self.ids.copy_(torch.randint(self.vocab_size, self.ids.shape, generator=noise))

    def at(self, position: int) -> None:
        self.batch.at(position)

    def _embedded(self, ids: Tensor) -> Stream:
        scale = self.structure.embedding_scale
        if self.ranks is None:
            return embed(ids, self.embedding, scale), None
        own, inside = among_own_rows(self.ranks, ids, len(self.embedding))
        return self.ranks.sum(embed(own, self.embedding, scale) * inside), None

    def _next(self, stream: Stream, rows: slice = slice(None)) -> Tensor:
        """Final norm, head and the next token of some sequences; no divisor of the logits changes which is the largest. -> [B]"""
        normed, _ = rms_norm(*stream, self.final_norm, self.structure.norm_eps)
        return self._best(linear(normed, self.head), rows)

    def _best(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """The next word. logits [B, V], or of this rank's words"""
        if self.ranks is not None:
            return best_word(self.ranks, logits)
        return self.choose(logits if self.noise is None else logits / self.structure.logits_divisor, rows)

    def _groups(self, prompts: Tensor) -> list[slice]:
        """Sequences go through together as long as they are PREFILL_ROWS tokens at most: more gain nothing but memory."""
        check_lengths(self.structure, prompts.shape[1], self.max_length)
        together = max(1, PREFILL_ROWS // prompts.shape[1])
        return [slice(begin, min(begin + together, len(prompts))) for begin in range(0, len(prompts), together)]

    def _through(self, prompts: Tensor, rows: slice) -> Stream:
        """Some of the prompts, through all sub-blocks. -> [rows·T, H] each"""
        batch, stream = self.batch.part(rows), self._embedded(prompts[rows].flatten())
        for part in self.parts:
            stream = part.prefill(stream, batch)
        return stream

    @torch.inference_mode()
    def prefill(self, prompts: Tensor) -> Tensor:
        num_tokens = prompts.shape[1]
        for rows in self._groups(prompts):
            stream, count = self._through(prompts, rows), rows.stop - rows.start
            delta, residual = (None if x is None else x.view(count, num_tokens, -1)[:, -1].clone() for x in stream)
            del stream  # the next prompts need its memory
            assert delta is not None
            self.ids[rows] = self._next((delta, residual), rows)
        self.batch.at(num_tokens)
        return self.ids.clone()

    @torch.inference_mode()
    def hidden(self, prompts: Tensor) -> Tensor:
        scale, eps = self.final_norm, self.structure.norm_eps
        found = [rms_norm(*self._through(prompts, rows), scale, eps)[0] for rows in self._groups(prompts)]
        return torch.cat(found).view(*prompts.shape, -1).div_(self.structure.logits_divisor)

    def _stepped(self) -> Tensor:
        stream = self._embedded(self.ids)
        for part in self.parts:
            stream = part.decode(stream, self.batch)
        return self._next(stream)

    @torch.inference_mode()
    def step_in_place(self) -> None:
        """A step whose token stays where it is."""
        self.ids.copy_(self._stepped())

    @torch.inference_mode()
    def step_again(self) -> None:
        """The same from the same tokens each time, to be timed: random weights soon give all sequences the same few words."""
        self.unused.copy_(self._stepped())

    def step(self) -> None:
        self.step_in_place()
        self.batch.advance()

    def replayed(self, call: Callable[[], object], warm_ups: int = 2) -> Callable[[], object]:
        """As a CUDA graph. The token in hand moves on by what is called before the capture."""
        position, ids = self.batch.positions.clone(), self.ids.clone()
        with torch.inference_mode():
            graph = Graph(call, self.device, warm_ups=warm_ups)
            self.batch.positions.copy_(position)
            self.batch.lengths.copy_(position + 1)
            self.ids.copy_(ids)
        return graph.replay
