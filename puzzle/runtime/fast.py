"""A static-batch runtime on our kernels: paged caches, and a decode step as one CUDA graph.

Any stack of sub-blocks runs: a child from a checkpoint, or an architecture with random weights, whose time is the same.
Letters: B batch, T prompt tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.base.workload import PREFILL_ROWS
from puzzle.blocklib.fast import Batch, Fast, FastAttention, Stream, make_fast, new_batch
from puzzle.blocklib.layer import KINDS, LayerSpec
from puzzle.blocklib.modules import SwiGLU
from puzzle.blocklib.variant import parse_variant
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.swiglu import linear
from puzzle.kernels.timer import Graph, time_replays
from puzzle.parents.known import Shapes
from puzzle.runtime.model import CausalModel


@dataclass(kw_only=True, slots=True)
class Stack:
    """Weights of a whole model: embedding and head [V, H], final norm [H], sub-blocks in order."""

    spec: LayerSpec
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    modules: list[nn.Module]

    @property
    def num_bytes(self) -> int:
        """Of all weights; a tied head counts once."""
        own = {id(self.embedding): self.embedding, id(self.head): self.head, id(self.final_norm): self.final_norm}
        tensors = [*own.values(), *(p for m in self.modules for p in m.parameters())]
        return sum(t.numel() * t.element_size() for t in tensors)


def stack_of(model: CausalModel) -> Stack:
    """The stack of a model in memory, sharing its weights."""
    modules = [getattr(block, kind) for block in model.blocks for kind in KINDS]
    return Stack(
        spec=model.spec,
        embedding=model.embedding.weight.data,
        head=model.head_weight.data,
        final_norm=model.norm.weight.data,
        modules=modules,
    )


def random_module(kind: str, name: str, spec: LayerSpec, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """A variant's module with random weights of the usual size; "x4" is an FFN of four times the parent's width, "f512" one of
    512 channels."""
    with torch.device("meta"):
        if wide := re.fullmatch(r"([xf])(\d+)", name):
            module: nn.Module = SwiGLU(spec, int(wide[2]) * (spec.intermediate_size if wide[1] == "x" else 1))
        else:
            module = parse_variant(kind, name, spec).empty(spec)  # type: ignore[arg-type]
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return module


def random_stack(
    shapes: Shapes, layers: Sequence[dict[str, str]], device: torch.device | str, dtype: torch.dtype
) -> Stack:
    """layers: {"attention": variant, "ffn": variant} each."""
    hidden = shapes.spec.hidden_size
    embedding = torch.empty(shapes.vocab_size, hidden, device=device, dtype=dtype).normal_()
    head = embedding
    if not shapes.tied:
        head = torch.empty_like(embedding).normal_(std=1 / math.sqrt(hidden))
    return Stack(
        spec=shapes.spec,
        embedding=embedding,
        head=head,
        final_norm=torch.ones(hidden, device=device, dtype=dtype),
        modules=[random_module(kind, layer[kind], shapes.spec, device, dtype) for layer in layers for kind in KINDS],
    )


class FastRunner:
    """Greedy generation of a batch of equally long prompts."""

    def __init__(self, stack: Stack, batch: int, max_length: int, fp8: bool = False, consume: bool = False):
        """consume: take the sub-blocks out of the stack, so that no weight is held twice."""
        self.stack, self.device = stack, stack.embedding.device
        self.batch: Batch = new_batch(stack.spec, batch, max_length, self.device, fp8)
        waiting = stack.modules if consume else list(stack.modules)
        made = [make_fast(waiting.pop(0), self.batch) for _ in range(len(waiting))]
        self.parts: list[Fast] = [part for part in made if part is not None]
        self.ids = torch.zeros(batch, dtype=torch.long, device=self.device)
        self._step: Graph | None = None

    @property
    def kv_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts if isinstance(part, FastAttention))

    def randomize(self) -> None:
        """Fill the caches with noise, to time a decode step without a prompt."""
        for part in self.parts:
            if isinstance(part, FastAttention):
                part.randomize()

    def _next(self, stream: Stream) -> Tensor:
        """Final norm, head and argmax of the rows in hand. -> [B]"""
        normed, _ = rms_norm(*stream, self.stack.final_norm, self.stack.spec.rms_norm_eps)
        return linear(normed, self.stack.head).argmax(-1)

    @torch.inference_mode()
    def prefill(self, prompts: Tensor) -> Tensor:
        """prompts [B, T] -> the first generated token of each sequence [B], which is also the next step's input.

        Sequences go through together as long as they are PREFILL_ROWS tokens at most: more gain nothing but memory.
        """
        num_tokens = prompts.shape[1]
        together = max(1, PREFILL_ROWS // num_tokens)
        for begin in range(0, len(prompts), together):
            rows = slice(begin, min(begin + together, len(prompts)))
            batch = self.batch.part(rows)
            stream: Stream = F.embedding(prompts[rows].flatten(), self.stack.embedding), None
            for part in self.parts:
                stream = part.prefill(stream, batch)
            delta, residual = (None if x is None else x.view(batch.size, num_tokens, -1)[:, -1].clone() for x in stream)
            del stream  # the next prompts need its memory
            assert delta is not None
            self.ids[rows] = self._next((delta, residual))
        self.batch.at(num_tokens)
        return self.ids.clone()

    def decode_once(self) -> None:
        """The token in hand of each sequence -> the next one; position by position if `advance` follows."""
        stream: Stream = F.embedding(self.ids, self.stack.embedding), None
        for part in self.parts:
            stream = part.decode(stream, self.batch)
        self.ids.copy_(self._next(stream))

    def _decode_and_advance(self) -> None:
        self.decode_once()
        self.batch.advance()

    @torch.inference_mode()
    def generate(self, prompts: Tensor, num_tokens: int) -> Tensor:
        """Greedy continuation. prompts [B, T] -> [B, num_tokens]"""
        if self._step is None:
            self._step = Graph(self._decode_and_advance, self.device)
        out = [self.prefill(prompts)]
        for _ in range(num_tokens - 1):
            self._step.replay()
            out.append(self.ids.clone())
        return torch.stack(out, dim=1)


def decode_step_seconds(runner: FastRunner, context: int, seconds: float = 0.1) -> float:
    """Median time of one decode step after `context` cached tokens, replayed as a graph."""
    runner.batch.at(context)
    with torch.inference_mode():
        graph = Graph(runner.decode_once, runner.device)
        return time_replays(graph.replay, 1, runner.device, seconds, 10).p50


def prefill_seconds(runner: FastRunner, length: int, seconds: float = 0.1) -> float:
    """Median time of one prefill of `length` tokens a sequence, replayed as a graph."""
    prompts = torch.randint(0, len(runner.stack.embedding), (runner.batch.size, length), device=runner.device)
    with torch.inference_mode():
        graph = Graph(lambda: runner.prefill(prompts), runner.device)
        return time_replays(graph.replay, 1, runner.device, seconds, 5).p50
