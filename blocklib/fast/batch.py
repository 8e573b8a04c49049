"""Sub-blocks as they run on a GPU: packed weights, the residual add fused into the norm, paged caches.

A sub-block takes the stream before it as two tensors, (delta, residual), and returns two: `delta` is what the previous
sub-block contributed and nobody has added yet, so that one kernel adds it and norms the sum. All sequences of a batch have
the same length. Nothing here waits for the device, so a whole decode step can be captured as a CUDA graph.

Letters: B sequences, T prompt tokens, M rows in hand, H hidden_size, D head_dim, P pages per sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from puzzle.base.ranks import Ranks
from puzzle.base.workload import PAGE
from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.sub_block import MissingFace, Normed
from puzzle.kernels.fp8 import to_fp8
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.swiglu import linear

Stream = tuple[Tensor, Tensor | None]  # (delta, residual), each [M, H]; no residual before the first sub-block


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeTable:
    """cos, sin [positions, D] float32, in rotate-half layout over whole heads: pairs (i, i + D/2), of which those that do not turn
    have cos 1 and sin 0. rotary_dim R: dimensions of a head that turn; with R < D queries and keys are reordered to fit."""

    cos: Tensor
    sin: Tensor
    rotary_dim: int


Tables = Mapping[str | None, RopeTable]  # by RoPE; None: without positions


class CachePool:
    """Memory that caches are cut from, full of noise: to time many shapes without filling each one's caches anew."""

    def __init__(self, num_bytes: int, dtype: torch.dtype, device: torch.device):
        self.buffer = torch.empty(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        for block in self.buffer.split(2**28):
            block.copy_(torch.empty(len(block), dtype=torch.bfloat16, device=device).normal_())
        self.used = 0

    @property
    def num_bytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """The next part of it. Raises ValueError when too little is left."""
        begin, self.used = self.used, self.used + math.prod(shape)
        if self.used > len(self.buffer):
            raise ValueError(f"a cache {shape} does not fit in what is left of {len(self.buffer)} elements")
        return self.buffer[begin : self.used].view(shape)


@dataclass(kw_only=True, slots=True)
class Batch:
    """What the layers of one static batch share. positions, lengths [B] int32: of the token in hand, and with it.
    table [B, P] int32: pages of each sequence, in order. ropes: float32. fp8, fp8_cache: weights of the sub-block that is made, and
    cached keys and values, are float8_e4m3fn, the weights with a scale per row. pool: where caches come from, if not from new memory full of
    zeros. ranks: that share every sub-block; None: it is whole."""

    positions: Tensor
    lengths: Tensor
    table: Tensor
    ropes: Tables
    max_length: int
    fp8: bool = False
    fp8_cache: bool = False
    rows: slice = field(default_factory=lambda: slice(None))  # of the layers' page tables: which sequences these are
    pool: CachePool | None = None
    ranks: Ranks | None = None

    @property
    def size(self) -> int:
        return len(self.positions)

    def part(self, rows: slice) -> Batch:
        """Some of the sequences, sharing all state."""
        return replace(
            self, positions=self.positions[rows], lengths=self.lengths[rows], table=self.table[rows], rows=rows
        )

    def at(self, position: int) -> None:
        """Make `position` the token in hand, of every sequence."""
        self.positions.fill_(position)
        self.lengths.fill_(position + 1)

    def advance(self) -> None:
        self.positions.add_(1)
        self.lengths.add_(1)


def num_pages(num_tokens: int) -> int:
    """That hold a sequence."""
    return -(-num_tokens // PAGE)


def new_batch(size: int, max_length: int, ropes: Tables, device: torch.device | str, fp8: bool = False) -> Batch:
    """ropes: of at least `num_pages(max_length) * PAGE` positions. fp8: of weights and cache."""
    pages = num_pages(max_length)
    positions = torch.zeros(size, dtype=torch.int32, device=device)
    table = torch.arange(size * pages, dtype=torch.int32, device=device).view(size, pages)
    shared = {"positions": positions, "lengths": positions + 1, "table": table, "ropes": ropes}
    return Batch(**shared, max_length=max_length, fp8=fp8, fp8_cache=fp8)  # type: ignore[arg-type]


class Product:
    """x wᵀ + bias with w as the batch wants it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, fp8: bool):
        self.weight, self.bias = weight, bias
        self.scale: Tensor | None = None
        if fp8:
            self.weight, self.scale = to_fp8(weight)

    @classmethod
    def of(cls, linear: nn.Linear, fp8: bool) -> Product:
        return cls(linear.weight.data, None if linear.bias is None else linear.bias.data, fp8)

    def __call__(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias


class Fast:
    """The base of all kinds on our kernels: norms around `inner`. A kind with a state has its own `decode` and `prefill`."""

    def __init__(self, part: Part, batch: Batch):
        self.sub_block, self.ranks = part.sub_block, batch.ranks
        assert isinstance(self.sub_block, Normed)
        self.eps, self.before, self.after = self.sub_block.norm_eps, None, None
        if self.sub_block.norm_before:
            self.before = self.norm_scale(part.norm.weight.data)
        if self.sub_block.norm_after:
            self.after = self.norm_scale(part.post_norm.weight.data)

    def norm_scale(self, weight: Tensor) -> Tensor:
        """What a norm multiplies with, in the weight's dtype."""
        assert isinstance(self.sub_block, Normed)
        return (1 + weight.float()).to(weight.dtype) if self.sub_block.norm_offset else weight

    def enter(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """What the sub-block's own matrices read, and the new residual. [M, H] each"""
        delta, residual = stream
        if self.before is not None:
            return rms_norm(delta, residual, self.before, self.eps)
        whole = delta if residual is None else delta + residual
        return whole, whole

    def leave(self, out: Tensor) -> Tensor:
        """From what they give to the contribution. [M, H]"""
        if self.ranks is not None:
            out = self.ranks.sum(out)
        if self.after is not None:
            out = rms_norm(out, None, self.after, self.eps)[0]
        assert isinstance(self.sub_block, Normed)
        return out if self.sub_block.residual_scale == 1 else out * self.sub_block.residual_scale

    def inner(self, entered: Tensor) -> Tensor:
        """Of a kind that depends on its rows alone. [M, H] -> [M, H]"""
        raise MissingFace(self.sub_block.kind, "path on our kernels by rows")

    def decode(self, stream: Stream, batch: Batch) -> Stream:
        """One token of each sequence. delta, residual [B, H]"""
        entered, residual = self.enter(stream)
        return self.leave(self.inner(entered)), residual

    def prefill(self, stream: Stream, batch: Batch) -> Stream:
        """All prompts. delta, residual [B·T, H], sequence by sequence."""
        return self.decode(stream, batch)

    @property
    def state_bytes(self) -> int:
        """Of what sequences keep between tokens."""
        return 0

    def randomize(self) -> None:
        """Fill the state with noise."""


def make_fast(part: Part, batch: Batch) -> Fast | None:
    """How `part` runs in this batch; None when it does nothing. Its state is made here."""
    return part.sub_block.fast(part, batch)
