"""Softmax attention on our kernels, over a paged cache.

Letters: B sequences, T prompt tokens, M rows in hand, H hidden_size, N query heads, K KV heads, D head_dim, R rotary
dimensions of a head, P pages per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.base.workload import PAGE
from puzzle.blocklib.fast.batch import Batch, Fast, Product, Stream
from puzzle.blocklib.plain.gqa import Attention, attention
from puzzle.blocklib.plain.part import causal_mask, rotate
from puzzle.kernels.decode_attention import decode_attention
from puzzle.kernels.rope_kv import rope_kv


class FastAttention(Fast):
    """Over a paged cache [B·P, 2, K, PAGE, D]; a window keeps only the pages that it can see."""

    def __init__(self, part: Attention, batch: Batch):
        super().__init__(part, batch)
        self.heads, self.kv_heads, self.dim = part.num_heads, part.num_kv_heads, part.head_dim
        rope = batch.ropes[part.rope]
        self.window, self.scale, self.cos, self.sin = part.window, part.scale, rope.cos, rope.sin
        self.sinks = None if part.sinks is None else part.sinks.data.float()
        parts = (part.q_proj, part.k_proj, part.v_proj)
        bias = None if parts[0].bias is None else torch.cat([p.bias.data for p in parts])
        weight = torch.cat([p.weight.data for p in parts])
        self.qkv = Product(weight, bias, batch.fp8)
        self.out = Product.of(part.o_proj, batch.fp8)
        self.part = part if part.qk_norm is not None else None
        self.order = None
        if rope.rotary_dim < self.dim:
            self.order = paired(self.dim, rope.rotary_dim).to(weight.device)
        self.table = batch.table
        ring = part.sub_block.state().kept(batch.table.shape[1] * PAGE, PAGE) // PAGE
        if ring < batch.table.shape[1]:
            inside = torch.arange(batch.table.shape[1], dtype=torch.int32, device=self.table.device) % ring
            first = torch.arange(batch.size, dtype=torch.int32, device=self.table.device) * ring
            self.table = (first[:, None] + inside[None, :]).contiguous()
        shape = (batch.size * ring, 2, self.kv_heads, PAGE, self.dim)
        if batch.pool is not None:
            self.cache = batch.pool.take(shape)
        else:
            kept = torch.float8_e4m3fn if batch.fp8_cache else weight.dtype
            self.cache = torch.zeros(shape, dtype=kept, device=weight.device)

    def randomize(self) -> None:
        for block in self.cache.split(1024):
            block.copy_(torch.randn(block.shape, dtype=torch.bfloat16, device=block.device))

    @property
    def state_bytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()

    def _project(self, entered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, N, D], k, v [M, K, D] of the M tokens in hand, before RoPE."""
        qkv = self.qkv(entered)
        q, k, v = qkv.view(len(qkv), -1, self.dim).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.part is not None:
            q, k = self.part.heads(q.flatten(1), self.part.q_norm), self.part.heads(k.flatten(1), self.part.k_norm)
        if self.order is not None:
            q, k = q[..., self.order], k[..., self.order]
        return q, k, v

    def decode(self, stream: Stream, batch: Batch) -> Stream:
        entered, residual = self.enter(stream)
        q, k, v = self._project(entered)
        q = rope_kv(q, k, v, self.cos, self.sin, batch.positions, self.cache, self.table)
        found = decode_attention(
            q, self.cache, self.table, batch.lengths, max_context=batch.max_length, window=self.window, scale=self.scale,
            sinks=self.sinks,
        )  # fmt: skip
        return self.leave(self.out(found.flatten(1))), residual

    def prefill(self, stream: Stream, batch: Batch) -> Stream:
        entered, residual = self.enter(stream)
        q, k, v = self._project(entered)
        num_tokens = len(q) // batch.size
        at = torch.arange(num_tokens, dtype=torch.int32, device=q.device)
        slots = self.table[batch.rows][:, at // PAGE] * PAGE + at % PAGE
        if self.window is not None:  # a ring of pages holds only what later tokens can see
            slots = slots.masked_fill(at < num_tokens - self.window, -1)
        positions, where = at.repeat(batch.size), slots.flatten().contiguous()
        q = rope_kv(q, k, v, self.cos, self.sin, positions, self.cache, None, slots=where)
        q, k, v = (x.reshape(batch.size, num_tokens, -1, self.dim).transpose(1, 2) for x in (q, k, v))
        k = rotate(k, (self.cos[:num_tokens], self.sin[:num_tokens]))
        if self.window and self.window < num_tokens:
            found = windowed(q, k, v, self.window, self.scale, self.sinks)
        else:
            found = attention(q, k, v, None, self.scale, self.sinks)
        return self.leave(self.out(found.transpose(1, 2).flatten(2).flatten(0, 1))), residual


def paired(dim: int, rotary_dim: int) -> Tensor:
    """An order of a head's dimensions in which those that turn stand in the pairs (i, i + D/2). [D]

    Scores do not change when queries and keys are reordered alike.
    """
    turn, stay = torch.arange(rotary_dim), torch.arange(rotary_dim, dim)
    halves = zip(turn.chunk(2), stay.chunk(2), strict=True)
    return torch.cat([torch.cat(half) for half in halves])


def windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention over the last `window` keys, a stretch of queries at a time. q [B, N, T, D], k, v [B, K, T, D]"""
    num_tokens, groups = q.shape[2], q.shape[1] // k.shape[1]
    found = torch.empty_like(q)
    for begin in range(0, num_tokens, window):
        end, first = min(begin + window, num_tokens), max(0, begin - window + 1)
        mask = causal_mask(end - first, window, q.device)[begin - first :]
        keys, values = (x[:, :, first:end].repeat_interleave(groups, dim=1) for x in (k, v))
        found[:, :, begin:end] = attention(q[:, :, begin:end], keys, values, mask, scale, sinks)
    return found
