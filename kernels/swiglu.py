"""The SwiGLU FFN: down(silu(x gateᵀ) · (x upᵀ)), gate and up interleaved in one weight (arXiv 2002.05202).

Few rows (decode): two products that stream their weights once, the activation in the first one's epilogue. Many rows
(prefill): cuBLAS multiplies and one pass applies the activation. Which way wins is a table, measured by
benchmarks/kernels/bench_skinny.py and bench_swiglu.py. fp8 weights carry a scale per row; with many rows x becomes fp8 too, by row.
Letters: M rows, H hidden_size, F intermediate_size.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.kernels.fp8 import FP8_MAX, from_fp8, to_fp8
from puzzle.kernels.skinny import MAX_ROWS, Config, skinny_linear

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

SILU_TO_FP8 = {"BLOCK_F": 2048, "num_warps": 16}


class Weights(NamedTuple):
    """gate_up [2F, H]: rows 2f and 2f+1 are gate and up of channel f. down [H, F]. Scales [2F], [H] when they are fp8."""

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None


def pack_swiglu(gate: Tensor, up: Tensor, down: Tensor, fp8: bool = False) -> Weights:
    """gate, up [F, H], down [H, F] -> packed weights; done once, when a model is loaded."""
    if gate.shape != up.shape or down.shape != gate.shape[::-1]:
        raise ValueError(f"gate {tuple(gate.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit")
    gate_up = torch.stack((gate, up), dim=1).flatten(0, 1)
    if not fp8:
        return Weights(gate_up, down.contiguous())
    (gate_up, gate_up_scale), (down, down_scale) = to_fp8(gate_up), to_fp8(down)
    return Weights(gate_up, down, gate_up_scale, down_scale)


def linear_reference(x: Tensor, w: Tensor, scale: Tensor | None = None) -> Tensor:
    """The twin of `linear`."""
    return F.linear(x, w if scale is None else from_fp8(w, scale[:, None]).to(x.dtype))


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """The twin of `silu_mul`."""
    return F.silu(gate_up[:, ::2]) * gate_up[:, 1::2]


if triton is not None:

    @triton.jit
    def silu_mul_kernel(gate_up_ptr, out_ptr, width, BLOCK_F: tl.constexpr):
        row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_F
        pairs = 2 * begin + tl.arange(0, 2 * BLOCK_F)
        value = tl.load(gate_up_ptr + row * 2 * width + pairs, mask=pairs < 2 * width, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(value, (BLOCK_F, 2)))
        f = begin + tl.arange(0, BLOCK_F)
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptr + row * width + f, (gate * tl.sigmoid(gate) * up).to(dtype), mask=f < width)

    @triton.jit
    def to_fp8_kernel(x_ptr, out_ptr, scale_ptr, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
        """A program a row; the second pass over the row comes from the L2."""
        row = tl.program_id(0).to(tl.int64)
        lanes = tl.arange(0, BLOCK)
        largest = tl.zeros((BLOCK,), tl.float32)
        for begin in tl.range(0, width, BLOCK):
            at = begin + lanes
            value = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value))
        peak = tl.max(largest, axis=0)
        scale = tl.where(peak > 0, peak / LIMIT, 1.0)
        tl.store(scale_ptr + row, scale)
        for begin in tl.range(0, width, BLOCK):
            at = begin + lanes
            value = tl.load(x_ptr + row * width + at, mask=at < width, other=0.0).to(tl.float32) / scale
            value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row * width + at, value, mask=at < width)

    @triton.jit
    def silu_mul_to_fp8_kernel(gate_up_ptr, out_ptr, scale_ptr, width, LIMIT: tl.constexpr, BLOCK_F: tl.constexpr):
        """A program a row: its largest magnitude, then the values again, which come from the L2."""
        row = tl.program_id(0).to(tl.int64)
        lanes, pair_lanes = tl.arange(0, BLOCK_F), tl.arange(0, 2 * BLOCK_F)
        source = gate_up_ptr + row * 2 * width
        largest = tl.zeros((BLOCK_F,), tl.float32)
        for begin in tl.range(0, width, BLOCK_F):
            pairs = 2 * begin + pair_lanes
            value = tl.load(source + pairs, mask=pairs < 2 * width, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(value, (BLOCK_F, 2)))
            largest = tl.maximum(largest, tl.abs(gate * tl.sigmoid(gate) * up))
        peak = tl.max(largest, axis=0)
        scale = tl.where(peak > 0, peak / LIMIT, 1.0)
        tl.store(scale_ptr + row, scale)
        inverse = 1.0 / scale
        for begin in tl.range(0, width, BLOCK_F):
            pairs = 2 * begin + pair_lanes
            value = tl.load(source + pairs, mask=pairs < 2 * width, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(value, (BLOCK_F, 2)))
            value = gate * tl.sigmoid(gate) * up * inverse
            value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT).to(out_ptr.dtype.element_ty)
            f = begin + lanes
            tl.store(out_ptr + row * width + f, value, mask=f < width)


def _on_kernels(x: Tensor) -> bool:
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def silu_mul(gate_up: Tensor) -> Tensor:
    """[M, 2F], pairs of gate and up -> silu(gate) · up [M, F]"""
    if not _on_kernels(gate_up):
        return silu_mul_reference(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up, out, width, BLOCK_F=block, num_warps=4)
    return out


def rows_to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`to_fp8` in one kernel."""
    if not _on_kernels(x):
        return to_fp8(x)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(x.shape[1]))
    to_fp8_kernel[(len(x),)](x, out, scale, x.shape[1], LIMIT=FP8_MAX, BLOCK=block, num_warps=8)
    return out, scale


def silu_mul_to_fp8(gate_up: Tensor, config: dict[str, int] = SILU_TO_FP8) -> tuple[Tensor, Tensor]:
    """`to_fp8` of `silu_mul`, in one pass over memory and without rounding in between: float8_e4m3fn [M, F], scale [M]."""
    if not _on_kernels(gate_up):
        return to_fp8(silu_mul_reference(gate_up))
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scale = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    block = min(config["BLOCK_F"], triton.next_power_of_2(width))
    silu_mul_to_fp8_kernel[(rows,)](
        gate_up, out, scale, width, LIMIT=FP8_MAX, BLOCK_F=block, num_warps=config["num_warps"]
    )
    return out, scale


def choose_linear(rows: int, num: int, columns: int, dtype: torch.dtype) -> Config | None:
    """A good tile of `skinny_linear` for w [num, columns]; None for more rows than it takes, where cuBLAS wins.

    What won in `benchmarks/kernels/bench_skinny.py --sweep` on an H100 SXM, torch 2.11, triton 3.6, 2026-11-24: bf16 weights of
    235/134/59/34/17/8 MB at 16 rows take 81/46/22/13/7.9/5.5 us, cuBLAS with a separate activation 89/51/25/18/12/9.8.
    """
    if rows > MAX_ROWS:
        return None
    few, tiles = rows <= 32, -(-num // 64)
    if dtype == torch.float8_e4m3fn:
        if few:
            split = 1 if tiles >= 224 else 2 if tiles >= 80 else 4 if tiles >= 48 else 8
            return Config(32, 256, 4 if split == 1 else 2, 4, split, 512)
        if tiles >= 192:
            return Config(64, 128, 4, 4, 1, 0)
        return Config(64, 256, 4, 3, 1 if tiles >= 96 else 2 if tiles >= 48 else 4 if tiles >= 24 else 8, 512)
    if few:
        if tiles >= 192:
            return Config(64, 128, 4, 4, 1, 0)
        if tiles >= 96:
            return Config(64, 256, 4, 3, 1, 512)
        if tiles >= 48 and columns <= 8192:
            return Config(64, 128, 4, 4, 4, 512)
        return Config(64, 256, 4, 3, 2 if tiles >= 48 else 4 if tiles >= 24 else 8, 512)
    if tiles >= 192:
        return Config(128, 128, 8, 4, 1, 0)
    return Config(64, 128, 4, 4, 1 if tiles >= 80 else 2 if tiles >= 48 else 4, 512)


def linear(x: Tensor, w: Tensor, scale: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """x [M, K], w [N, K] in x's dtype, or float8_e4m3fn with scale [N] -> x wᵀ [M, N]; silu · up of its pairs if gated."""
    if not _on_kernels(x):
        out = linear_reference(x, w, scale)
        return silu_mul_reference(out) if gated else out
    config = choose_linear(len(x), len(w), w.shape[1], w.dtype)
    if config is not None:
        return skinny_linear(x, w, config, scale=scale, gated=gated)
    out = F.linear(x, w) if scale is None else fp8_product(*rows_to_fp8(x), w, scale, x.dtype)
    return silu_mul(out) if gated else out


def fp8_product(x: Tensor, x_scale: Tensor, w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, K], w [N, K] in float8_e4m3fn with a scale per row each -> [M, N]"""
    scales = {"scale_a": x_scale[:, None], "scale_b": scale[None, :]}
    return torch._scaled_mm(x, w.t(), **scales, out_dtype=dtype, use_fast_accum=True)


def swiglu(x: Tensor, weights: Weights) -> Tensor:
    """x [M, H] -> [M, H], in x's dtype with float32 sums. Raises ValueError when x does not fit the weights."""
    hidden = weights.gate_up.shape[1]
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x {tuple(x.shape)} wants [M, {hidden}]")
    if weights.down_scale is not None and len(x) > MAX_ROWS and _on_kernels(x):
        narrow, row_scale = silu_mul_to_fp8(linear(x, weights.gate_up, weights.gate_up_scale))
        return fp8_product(narrow, row_scale, weights.down, weights.down_scale, x.dtype)
    inner = linear(x, weights.gate_up, weights.gate_up_scale, gated=True)
    return linear(inner, weights.down, weights.down_scale)
