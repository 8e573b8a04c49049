"""Sub-blocks as they run on a GPU: packed weights, the residual add fused into the norm, a paged KV cache.

A sub-block takes the stream before it as two tensors, (delta, residual), and returns two: `delta` is what the previous
sub-block contributed and nobody has added yet, so that one kernel adds it and norms the sum. All sequences of a batch have
the same length. Nothing here waits for the device, so a whole decode step can be captured as a CUDA graph.

Letters: B sequences, T prompt tokens, H hidden_size, N query heads, K KV heads, D head_dim, P pages per sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.layer import LayerSpec, rope_tables
from puzzle.blocklib.modules import Attention, Linear, NoOp, SwiGLU, causal_mask, rotate
from puzzle.kernels.decode_attention import decode_attention
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.rope_kv import rope_kv
from puzzle.kernels.swiglu import Weights, linear, pack_swiglu, swiglu, to_fp8

PAGE = 64  # tokens of one page

Stream = tuple[Tensor, Tensor | None]  # (delta, residual), each [B·T, H]; no residual before the first sub-block


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
    table [B, P] int32: pages of each sequence, in order. cos, sin [max_length, D] float32. fp8: weights of sub-blocks and
    cached keys and values are float8_e4m3fn, the weights with a scale per row. pool: where caches come from, if not from new
    memory full of zeros."""

    positions: Tensor
    lengths: Tensor
    table: Tensor
    cos: Tensor
    sin: Tensor
    max_length: int
    fp8: bool = False
    rows: slice = field(default_factory=lambda: slice(None))  # of the layers' page tables: which sequences these are
    pool: CachePool | None = None

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


def kept_pages(num_pages: int, window: int | None) -> int:
    """Pages of a sequence that a layer keeps, of `num_pages`: with a window only those that it can see."""
    return num_pages if window is None else min(num_pages, -(-window // PAGE) + 1)


def new_batch(spec: LayerSpec, size: int, max_length: int, device: torch.device | str, fp8: bool = False) -> Batch:
    pages = -(-max_length // PAGE)
    cos, sin = rope_tables(spec, pages * PAGE, device)
    positions = torch.zeros(size, dtype=torch.int32, device=device)
    table = torch.arange(size * pages, dtype=torch.int32, device=device).view(size, pages)
    return Batch(
        positions=positions, lengths=positions + 1, table=table, cos=cos, sin=sin, max_length=max_length, fp8=fp8
    )


class _Product:
    """x wᵀ + bias with w as the batch wants it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, fp8: bool):
        self.weight, self.bias = weight, bias
        self.scale: Tensor | None = None
        if fp8:
            self.weight, self.scale = to_fp8(weight)

    def __call__(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias


class FastAttention:
    """Softmax attention over a paged cache [B·P, 2, K, PAGE, D]; a window keeps only the pages that it can see."""

    def __init__(self, module: Attention, batch: Batch):
        self.heads, self.kv_heads, self.dim = module.num_heads, module.num_kv_heads, module.head_dim
        self.window = module.window
        self.norm, self.eps = module.norm.weight.data, module.norm.eps
        parts = (module.q_proj, module.k_proj, module.v_proj)
        bias = None if parts[0].bias is None else torch.cat([p.bias.data for p in parts])
        self.qkv = _Product(torch.cat([p.weight.data for p in parts]), bias, batch.fp8)
        self.out = _Product(module.o_proj.weight.data, module.o_proj.bias, batch.fp8)
        self.head_norms = None if isinstance(module.q_norm, nn.Identity) else (module.q_norm, module.k_norm)
        self.table = batch.table
        ring = kept_pages(batch.table.shape[1], self.window)
        if ring < batch.table.shape[1]:
            inside = torch.arange(batch.table.shape[1], dtype=torch.int32, device=self.table.device) % ring
            first = torch.arange(batch.size, dtype=torch.int32, device=self.table.device) * ring
            self.table = (first[:, None] + inside[None, :]).contiguous()
        shape = (batch.size * ring, 2, self.kv_heads, PAGE, self.dim)
        if batch.pool is not None:
            self.cache = batch.pool.take(shape)
        else:
            kept = torch.float8_e4m3fn if batch.fp8 else self.norm.dtype
            self.cache = torch.zeros(shape, dtype=kept, device=self.norm.device)

    def randomize(self) -> None:
        """Fill the cache with noise."""
        for block in self.cache.split(1024):
            block.copy_(torch.randn(block.shape, dtype=torch.bfloat16, device=block.device))

    @property
    def num_bytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()

    def _project(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The new residual, and q [M, N, D], k, v [M, K, D] of the M tokens in hand, before RoPE."""
        delta, residual = stream
        normed, residual = rms_norm(delta, residual, self.norm, self.eps)
        qkv = self.qkv(normed)
        q, k, v = qkv.view(len(qkv), -1, self.dim).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.head_norms is not None:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        return residual, q, k, v

    def decode(self, stream: Stream, batch: Batch) -> Stream:
        """One token of each sequence. delta, residual [B, H]"""
        residual, q, k, v = self._project(stream)
        q = rope_kv(q, k, v, batch.cos, batch.sin, batch.positions, self.cache, self.table)
        found = decode_attention(
            q, self.cache, self.table, batch.lengths, max_context=batch.max_length, window=self.window
        )
        return self.out(found.flatten(1)), residual

    def prefill(self, stream: Stream, batch: Batch) -> Stream:
        """All prompts. delta, residual [B·T, H], sequence by sequence."""
        residual, q, k, v = self._project(stream)
        num_tokens = len(q) // batch.size
        at = torch.arange(num_tokens, dtype=torch.int32, device=q.device)
        slots = self.table[batch.rows][:, at // PAGE] * PAGE + at % PAGE
        if self.window is not None:  # a ring of pages holds only what later tokens can see
            slots = slots.masked_fill(at < num_tokens - self.window, -1)
        q = rope_kv(
            q, k, v, batch.cos, batch.sin, at.repeat(batch.size), self.cache, None, slots=slots.flatten().contiguous()
        )
        q, k, v = (x.reshape(batch.size, num_tokens, -1, self.dim).transpose(1, 2) for x in (q, k, v))
        k = rotate(k, (batch.cos[:num_tokens], batch.sin[:num_tokens]))
        found = windowed(q, k, v, self.window) if self.window and self.window < num_tokens else _causal(q, k, v)
        return self.out(found.transpose(1, 2).flatten(2).flatten(0, 1)), residual


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` keys, a stretch of queries at a time. q [B, N, T, D], k, v [B, K, T, D]"""
    num_tokens, groups = q.shape[2], q.shape[1] // k.shape[1]
    found = torch.empty_like(q)
    for begin in range(0, num_tokens, window):
        end, first = min(begin + window, num_tokens), max(0, begin - window + 1)
        mask = causal_mask(end - first, window, q.device)[begin - first :]
        keys, values = (x[:, :, first:end].repeat_interleave(groups, dim=1) for x in (k, v))
        found[:, :, begin:end] = F.scaled_dot_product_attention(q[:, :, begin:end], keys, values, attn_mask=mask)
    return found


class FastSwiGLU:
    """The FFN; decode and prefill differ only in the number of rows."""

    def __init__(self, module: SwiGLU, fp8: bool):
        if module.gate_proj.bias is not None:
            self.weights: Weights | None = None
            self.module = module
        else:
            self.weights = pack_swiglu(
                module.gate_proj.weight.data, module.up_proj.weight.data, module.down_proj.weight.data, fp8
            )
        self.norm, self.eps = module.norm.weight.data, module.norm.eps

    def decode(self, stream: Stream, batch: Batch) -> Stream:
        normed, residual = rms_norm(*stream, self.norm, self.eps)
        if self.weights is None:
            return self.module.down_proj(self.module.inner(normed)), residual
        return swiglu(normed, self.weights), residual

    prefill = decode


class FastLinear:
    """One matrix after the norm."""

    def __init__(self, module: Linear, fp8: bool):
        self.norm, self.eps = module.norm.weight.data, module.norm.eps
        self.product = _Product(module.linear.weight.data, None, fp8)

    def decode(self, stream: Stream, batch: Batch) -> Stream:
        normed, residual = rms_norm(*stream, self.norm, self.eps)
        return self.product(normed), residual

    prefill = decode


Fast = FastAttention | FastSwiGLU | FastLinear


def make_fast(module: nn.Module, batch: Batch) -> Fast | None:
    """How `module` runs in this batch; None when it does nothing. Attention gets its cache here."""
    if isinstance(module, NoOp):
        return None
    makers: dict[type, Callable[[], Fast]] = {
        Attention: lambda: FastAttention(module, batch),  # type: ignore[arg-type]
        SwiGLU: lambda: FastSwiGLU(module, batch.fp8),  # type: ignore[arg-type]
        Linear: lambda: FastLinear(module, batch.fp8),  # type: ignore[arg-type]
    }
    if type(module) not in makers:
        raise NotImplementedError(f"no fast path for {type(module).__name__}: add one in blocklib/fast.py")
    return makers[type(module)]()
