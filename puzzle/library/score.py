"""Replace-one-block scores: what each variant alone costs in an otherwise intact parent.

The parent's residual stream is carried forward one layer at a time, so a variant of layer i runs layers i … L only
(Puzzle, arXiv 2411.19146, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from puzzle.base.console import Bar, progress
from puzzle.base.device import PLANNED, compute_dtype, held_memory
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash
from puzzle.base.ranks import Ranks, held_by_all, running_ranks
from puzzle.base.units import check_positive
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.plain.fp8 import cache_in_fp8, weights_in_fp8
from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.variant import PARENT
from puzzle.data.packing import load_tokens
from puzzle.library.assemble import load_variant, open_parent
from puzzle.library.manifest import FP8_CACHE, FP8_WEIGHTS, Library, Replacement, score_name
from puzzle.library.plan import scoring_bytes, scoring_costs
from puzzle.library.results import Results, share
from puzzle.library.store import BlockStore
from puzzle.parents.opened import HfModel
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import CausalModel, load_model


class Scorer:
    """Scores the blocks of one library against its parent on held-out sequences [S, T]."""

    def __init__(self, library: Library, parent: HfModel, sequences: Tensor, ranks: Ranks, batch_size: int):
        self.library, self.ranks, self.device = library, ranks, ranks.device
        device = self.device
        self.store = BlockStore(library.root)
        self.dtype = compute_dtype(device)
        self.model: CausalModel = load_model(parent, device=device, dtype=self.dtype)
        self.batches = [ids.long().to(device) for ids in sequences.split(batch_size)]
        self.ropes = self.model.ropes(sequences.shape[1])

    @torch.no_grad()
    def run(self, data_hash: str, joint: bool, fp8: bool = False) -> None:
        """Fill scores/LNN.json for every layer; what is already scored on the same data and blocks is kept, the rest removed
        before anything is measured: scores on different texts do not add up, wherever this is stopped."""
        self.streams = [self.model.embed(ids) for ids in self.batches]
        self.finals = [self.model.hidden(ids) for ids in self.batches]
        todo = {layer: self._wanted(layer, joint) for layer in self.library.layers}
        if fp8:
            todo = {n: [*todo.get(n, ()), *self._quantised(n)] for n in range(self.library.num_layers)}
        layers = range(self.library.num_layers)
        results = Results(self.library.root, todo, layers, lambda layer: self._key(layer, data_hash), self.ranks)
        mine = share(results.missing(), scoring_costs(self.library.structure), self.ranks)
        with progress("score", sum(map(len, mine.values()))) as bar:
            for layer, block in enumerate(self.model.blocks):
                if layer in mine:
                    self._score_layer(layer, mine[layer], bar, results)
                self.streams = [block(x, self.ropes) for x in self.streams]
        results.close()

    def _wanted(self, layer: int, joint: bool) -> list[Replacement]:
        """Every variant alone and, for joint scores, one of every slot together."""
        spaces = self.library.spaces[layer]
        names = {slot: [name for name in space if name != PARENT] for slot, space in spaces.items()}
        alone: list[Replacement] = [{slot: name} for slot, found in names.items() for name in found]
        together = [dict(zip(names, choice, strict=True)) for choice in product(*names.values())]
        return [*alone, *together] if joint and len(names) > 1 else alone

    def _quantised(self, layer: int) -> list[Replacement]:
        """The parent's own sub-blocks with their weights in fp8, and with what they cache in fp8."""
        own = self.library.structure.layers[layer]
        weights = [{slot: FP8_WEIGHTS} for slot, sub_block in own.items() if not isinstance(sub_block, NoOp)]
        return [*weights, *({slot: FP8_CACHE} for slot, sub_block in own.items() if isinstance(sub_block, Gqa))]

    def _key(self, layer: int, data_hash: str) -> str:
        """What the scores of a layer depend on."""
        hashes = {
            slot: {name: self.store.record(layer, slot, name)["sha256"] for name in space if name != PARENT}
            for slot, space in self.library.spaces[layer].items()
        }
        return content_hash([self.library.fingerprint, data_hash, hashes, str(self.device.type)])

    def _score_layer(self, layer: int, wanted: list[Replacement], bar: Bar, results: Results) -> None:
        spaces, found = self.library.spaces[layer], {}
        own: dict[str, Part] = self.model.blocks[layer].parts()  # type: ignore[operator]

        @cache
        def part(slot: str, name: str) -> Part:
            if name == FP8_WEIGHTS:
                return weights_in_fp8(own[slot])
            if name == FP8_CACHE:
                assert isinstance(own[slot], Attention)
                return cache_in_fp8(own[slot])
            return load_variant(self.store, layer, slot, name, spaces[slot][name], self.device, self.dtype)

        for replacement in wanted:
            name = score_name(replacement)
            bar.note(f"layer {layer} {name}")
            parts = own | {slot: part(slot, variant) for slot, variant in replacement.items()}
            found[name] = self._score(layer, name, parts)
            bar.advance()
        results.add(layer, found)

    def _score(self, layer: int, name: str, parts: dict[str, Part]) -> dict[str, float]:
        """Of the parent with `parts` in one layer, which errors call `name`."""
        meter = Divergence()
        for ids, x, final in zip(self.batches, self.streams, self.finals, strict=True):
            for part in parts.values():
                x = part.add(x, self.ropes)
            for later in self.model.blocks[layer + 1 :]:
                x = later(x, self.ropes)
            meter.add(self.model, final, self.model, x, ids)
        result = meter.result()
        if not math.isfinite(result["kl"]):
            raise UserError(
                f"layer {layer} {name} makes the model's output NaN: its training diverged; delete "
                f"{self.store.layer(layer)} and run `puzzle build-library` again with a smaller --lr"
            )
        return result


@dataclass(kw_only=True, slots=True)
class ScoreOptions:
    """sequences: held-out ones, of seq_len tokens (None: as in training), batch_size at a time or as many as memory_limit (None:
    the device) lets; joint: also every combination of a layer's slots; fp8: also what fp8 costs the parent's own sub-blocks."""

    sequences: int = 64
    seq_len: int | None = None
    batch_size: int = 8
    joint: bool = False
    fp8: bool = False
    memory_limit: int | None = None
    text_field: str = "text"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "sequences", "seq_len", "batch_size", "memory_limit")


def score_library(
    root: Path, data: list[str], options: ScoreOptions | None = None, *, parent: str | None = None
) -> Path:
    """Score every block of the library on held-out documents, together with the other processes if `torchrun` started several.
    Returns the directory of the scores."""
    options = options or ScoreOptions()
    with running_ranks(options.device) as ranks:
        return _score_library(root, data, options, parent, ranks)


def _score_library(root: Path, data: list[str], options: ScoreOptions, parent: str | None, ranks: Ranks) -> Path:
    library = Library.open(root)
    opened = open_parent(library, parent)
    tokens = ranks.from_first(
        lambda: load_tokens(
            data,
            opened.directory,
            seq_len=options.seq_len or library.facts["data"]["seq_len"],
            num_train=1,
            num_validation=options.sequences,
            text_field=options.text_field,
            seed=library.facts["seed"],
        )
    )
    device, (count, length) = ranks.device, tokens.validation.shape

    def needed(batch_size: int) -> int:
        return scoring_bytes(opened.structure, count, length, batch_size, compute_dtype(device).itemsize)

    memory = ranks.memory(options.memory_limit)
    fitting = [size for size in range(1, options.batch_size + 1) if needed(size) <= memory]
    if not fitting:
        raise UserError(
            f"scoring {count} sequences of {length} tokens needs {(held_memory(device) + needed(1) / PLANNED) / 1e9:.2f} GB in "
            "all: use fewer `sequences`, a smaller `seq_len` or a larger `memory_limit`"
        )
    with held_by_all(root, ranks):
        Scorer(library, opened, tokens.validation, ranks, fitting[-1]).run(tokens.hash, options.joint, options.fp8)
    return root / "scores"
