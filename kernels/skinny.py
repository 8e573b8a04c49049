"""A product with few rows, as decode makes them: the weight streams through once, at the speed of the memory.

    out = x wᵀ                                  x [M, K], w [N, K]
    out = silu(x gateᵀ) · (x upᵀ)               gated: w's rows 2f and 2f+1 are gate and up of channel f (arXiv 2002.05202)

fp8 weights carry a scale per row and become x's dtype in registers. The contraction may be split among programs, whose sums
the last one to arrive adds in a fixed order. While the kernel before ends, the first weights are brought to the L2 (`overlap`).
Letters: M rows of x, N rows of w, K their columns, T tiles of N.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.kernels.overlap import launch_options

try:
    import triton
    import triton.language as tl

    from puzzle.kernels.overlap import follow
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

MAX_ROWS = 64
MAX_TILES = 1 << 16


class Config(NamedTuple):
    """Tile [block_n, block_k] of the weight, pipeline, splits of K, columns brought to the L2 ahead of time."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    prefetch: int = 0


def skinny_linear_reference(
    x: Tensor, w: Tensor, *, scale: Tensor | None = None, gated: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """The twin of `skinny_linear` in plain PyTorch: same arguments, same results up to rounding."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) @ w.to(wide).T
    if scale is not None:
        out = out * scale
    if gated:
        out = F.silu(out[:, ::2]) * out[:, 1::2]
    return out.to(dtype or x.dtype)


if triton is not None:

    @triton.jit
    def gated(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """silu(gate) · up of interleaved pairs [ROWS, COLUMNS] float32 -> [ROWS, COLUMNS/2]."""
        gate, up = tl.split(tl.reshape(pairs, (ROWS, COLUMNS // 2, 2)))
        return gate * tl.sigmoid(gate) * up

    @triton.jit
    def prefetch_rows(w_ptr, first_row, last_row, start, stop, K, ROWS: tl.constexpr, BYTES: tl.constexpr):
        """Ask the L2 for columns start…stop of rows first_row…last_row of w [N, K]; a column is BYTES wide. sm_90 or newer."""
        LANES: tl.constexpr = ROWS if ROWS > 128 else 128
        lane = tl.arange(0, LANES)
        row = first_row + lane % ROWS
        size = tl.where((lane < ROWS) & (row < last_row), tl.maximum(stop - start, 0) * BYTES, 0)
        address = (w_ptr + row.to(tl.int64) * K + start).to(tl.int64)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

    @triton.jit
    def skinny_store(
        acc, scale_ptr, out_ptr, tile, M, N, out_row, GATED: tl.constexpr, HAS_SCALE: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """The epilogue of `skinny_kernel`: acc [BLOCK_N, BLOCK_M] is out transposed."""
        if HAS_SCALE:
            channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            acc *= tl.load(scale_ptr + channels, mask=channels < N, other=0.0)[:, None]
        result = tl.trans(acc)
        if GATED:
            result = gated(result, BLOCK_M, BLOCK_N)
            columns = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            inside = columns < N // 2
        else:
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = columns < N
        rows = tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & inside[None, :]
        tl.store(out_ptr + rows[:, None] * out_row + columns[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit(do_not_specialize=["M"])
    def skinny_kernel(
        x_ptr, w_ptr, scale_ptr, out_ptr, partial_ptr, counter_ptr, M, N, K, x_row, out_row,
        GATED: tl.constexpr, HAS_SCALE: tl.constexpr, EVEN_K: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Program (tile, split): BLOCK_N rows of w times all M ≤ BLOCK_M rows of x, over one of SPLIT_K stretches of K.

        The weight is the left operand (out^T = w · x^T), so it goes from shared memory straight to the tensor cores. fp8 weights
        become x's dtype in registers; scale [N] float32 is applied at the end. With SPLIT_K > 1 every program leaves its sums in
        partial [SPLIT_K, T, BLOCK_N, BLOCK_M] float32 and counts itself in counter [T]; the last one of a tile adds them in the
        order of the splits, so equal inputs give equal bits, and sets the counter back to zero for the next launch.

        PDL: this launch may overlap the end of the one before it. Until griddepcontrol.wait only weights are touched: the first
        PREFETCH columns of the program's share are brought to the L2.
        """
        tile = tl.program_id(0)
        split = tl.program_id(1)
        num_chunks = tl.cdiv(K, BLOCK_K)
        first = split * num_chunks // SPLIT_K
        last = (split + 1) * num_chunks // SPLIT_K
        if PREFETCH > 0:
            start = first * BLOCK_K
            stop = tl.minimum(tl.minimum(start + PREFETCH, last * BLOCK_K), K)
            prefetch_rows(
                w_ptr, tile * BLOCK_N, N, start, stop, K, BLOCK_N, w_ptr.dtype.element_ty.primitive_bitwidth // 8
            )
        follow(PDL)
        tokens = tl.arange(0, BLOCK_M)
        channels = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        lanes = tl.arange(0, BLOCK_K)
        x_at = x_ptr + tokens[None, :] * x_row + lanes[:, None]
        w_at = w_ptr + channels[:, None].to(tl.int64) * K + lanes[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for chunk in tl.range(first, last):
            k = chunk * BLOCK_K
            if EVEN_K:
                w = tl.load(w_at + k, mask=(channels < N)[:, None], other=0.0)
                x = tl.load(x_at + k, mask=(tokens < M)[None, :], other=0.0)
            else:
                inside = lanes < K - k
                w = tl.load(w_at + k, mask=(channels < N)[:, None] & inside[None, :], other=0.0)
                x = tl.load(x_at + k, mask=(tokens < M)[None, :] & inside[:, None], other=0.0)
            if HAS_SCALE:
                # not straight to bf16: sm_90 does that a value at a time, four times slower
                w = w.to(tl.float16).to(tl.float32)
            acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
        if SPLIT_K == 1:
            skinny_store(acc, scale_ptr, out_ptr, tile, M, N, out_row, GATED, HAS_SCALE, BLOCK_M, BLOCK_N)
        else:
            within = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tokens[None, :]
            stride = tl.num_programs(0) * (BLOCK_N * BLOCK_M)
            at = partial_ptr + tile * (BLOCK_N * BLOCK_M) + within
            tl.store(at + split * stride, acc)
            tl.debug_barrier()
            arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
            if arrived == SPLIT_K - 1:
                total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                for other in tl.range(0, SPLIT_K):
                    total += tl.load(at + other * stride, cache_modifier=".cg")
                skinny_store(total, scale_ptr, out_ptr, tile, M, N, out_row, GATED, HAS_SCALE, BLOCK_M, BLOCK_N)
                tl.store(counter_ptr + tile, 0)


@cache
def _counters(device: torch.device) -> Tensor:
    """Arrivals per tile; kernels leave zeros behind."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def skinny_linear(
    x: Tensor, w: Tensor, config: Config, *, scale: Tensor | None = None, gated: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """x [M, K], M at most MAX_ROWS, w [N, K] in x's dtype or float8_e4m3fn with scale [N] float32 -> [M, N], or [M, N/2]
    if gated, in `dtype`, by default x's. Sums are float32; equal inputs give equal bits. Raises ValueError for shapes that do not fit.
    """
    rows, columns = x.shape
    num = len(w)
    if w.shape[1] != columns or rows > MAX_ROWS or (scale is None) == (w.dtype == torch.float8_e4m3fn):
        raise ValueError(
            f"x {tuple(x.shape)} wants at most {MAX_ROWS} rows, and w [N, {columns}] with a scale exactly when it is fp8, "
            f"not {tuple(w.shape)} {w.dtype}"
        )
    if triton is None or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return skinny_linear_reference(x, w, scale=scale, gated=gated, dtype=dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, num // 2 if gated else num, dtype=dtype or x.dtype, device=x.device)
    block_m, tiles = max(16, triton.next_power_of_2(rows)), triton.cdiv(num, config.block_n)
    split = min(config.split_k, triton.cdiv(columns, config.block_k))
    partial, counters = out, out
    if split > 1:
        partial = torch.empty(split * tiles * config.block_n * block_m, dtype=torch.float32, device=x.device)
        counters = _counters(x.device)
    options = launch_options(x.device)
    aligned = columns * w.element_size() % 16 == 0  # what a bulk prefetch asks of every row
    prefetch = config.prefetch if options["PDL"] and aligned else 0
    skinny_kernel[(tiles, split)](
        x, w, scale, out, partial, counters, rows, num, columns, x.stride(0), out.stride(0),
        GATED=gated, HAS_SCALE=scale is not None, EVEN_K=columns % config.block_k == 0, SPLIT_K=split, BLOCK_M=block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, PREFETCH=prefetch, num_warps=config.num_warps,
        num_stages=config.num_stages, **options,
    )  # fmt: skip
    return out
