"""The SwiGLU FFN: down(silu(x gateᵀ) · (x upᵀ)), with gate and up packed into one weight (arXiv 2002.05202).

Few rows (decode): one kernel streams gate and up once and writes the activation, so that their product never reaches memory;
many rows: cuBLAS multiplies and one pass applies the activation. `down` is cuBLAS' in both. Which way wins is a table, measured
by benchmarks/bench_swiglu.py. Letters: M rows, H hidden_size, F intermediate_size.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

FUSED_ROWS = 64  # more rows go through cuBLAS


class Weights(NamedTuple):
    """gate_up [2F, H]: gate's rows, then up's. down [H, F]."""

    gate_up: Tensor
    down: Tensor


class Config(NamedTuple):
    """Tile and pipeline of the fused kernel. block_f: rows of gate (and of up) in one program."""

    block_f: int
    block_h: int
    num_warps: int
    num_stages: int


def pack_swiglu(gate: Tensor, up: Tensor, down: Tensor) -> Weights:
    """gate, up [F, H], down [H, F] -> packed weights; done once, when a model is loaded."""
    if gate.shape != up.shape or down.shape != gate.shape[::-1]:
        raise ValueError(f"gate {tuple(gate.shape)}, up {tuple(up.shape)} and down {tuple(down.shape)} do not fit")
    return Weights(torch.cat((gate, up)), down.contiguous())


def swiglu_reference(x: Tensor, weights: Weights) -> Tensor:
    """The twin of `swiglu` in plain PyTorch: same arguments, same results up to rounding."""
    gate, up = F.linear(x, weights.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights.down)


if triton is not None:

    @triton.jit
    def gate_up_kernel(
        x_ptr, weight_ptr, out_ptr, num_rows, width,
        H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        m, f = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        h = tl.arange(0, BLOCK_H)
        inside_m, inside_f = m < num_rows, f < width
        gate = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
        up = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
        rows = f.to(tl.int64)[:, None] * H
        for begin in tl.range(0, H, BLOCK_H, num_stages=STAGES):
            at = begin + h
            inside_h = at < H
            x = tl.load(x_ptr + m[None, :] * H + at[:, None], mask=inside_h[:, None] & inside_m[None, :], other=0.0)
            mask = inside_f[:, None] & inside_h[None, :]
            w = tl.load(weight_ptr + rows + at[None, :], mask=mask, other=0.0)
            gate = tl.dot(w, x, gate, input_precision="ieee")
            w = tl.load(weight_ptr + width.to(tl.int64) * H + rows + at[None, :], mask=mask, other=0.0)
            up = tl.dot(w, x, up, input_precision="ieee")
        dtype = out_ptr.dtype.element_ty
        gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        tl.store(
            out_ptr + m[None, :] * width + f[:, None], value.to(dtype), mask=inside_f[:, None] & inside_m[None, :]
        )  # fmt: skip

    @triton.jit
    def silu_mul_kernel(gate_up_ptr, out_ptr, width, BLOCK_F: tl.constexpr):
        row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = f < width
        dtype = out_ptr.dtype.element_ty
        gate = tl.load(gate_up_ptr + row * 2 * width + f, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * 2 * width + width + f, mask=inside, other=0.0).to(tl.float32)
        value = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
        tl.store(out_ptr + row * width + f, value.to(dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """[M, 2F] -> silu(first half) · second half [M, F]"""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, triton.next_power_of_2(width))
    silu_mul_kernel[(rows, triton.cdiv(width, block))](gate_up, out, width, BLOCK_F=block, num_warps=4)
    return out


def fused_gate_up(x: Tensor, gate_up: Tensor, config: Config) -> Tensor:
    """x [M, H], M at most FUSED_ROWS -> silu(x gateᵀ) · (x upᵀ) [M, F]"""
    rows, hidden = x.shape
    width = gate_up.shape[0] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    gate_up_kernel[(triton.cdiv(width, config.block_f),)](
        x, gate_up, out, rows, width,
        H=hidden, BLOCK_M=max(16, triton.next_power_of_2(rows)), BLOCK_F=config.block_f, BLOCK_H=config.block_h,
        STAGES=config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    return out


def choose(rows: int, hidden: int, width: int) -> Config | None:
    """The fused kernel's tile where it beats cuBLAS with a separate activation; None where it does not."""
    if rows > FUSED_ROWS:
        return None
    return Config(32 if width <= 4096 else 64, 128, 4, 4)


def swiglu(x: Tensor, weights: Weights) -> Tensor:
    """x [M, H] -> [M, H], in x's dtype with float32 sums. Raises ValueError when x does not fit the weights."""
    hidden = weights.gate_up.shape[1]
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x {tuple(x.shape)} wants [M, {hidden}]")
    if triton is None or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return swiglu_reference(x, weights)
    config = choose(len(x), hidden, weights.gate_up.shape[0] // 2)
    if config is not None:
        inner = fused_gate_up(x.contiguous(), weights.gate_up, config)
    else:
        inner = silu_mul(F.linear(x, weights.gate_up))
    return F.linear(inner, weights.down)
