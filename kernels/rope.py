"""RoPE for training, forward and backward in one pass over memory each.

    y = (a cos_a - b sin_a, b cos_b + a sin_b)      a, b: first and second half of a head (arXiv 2104.09864)
    x̄ = (ȳ_a cos_a + ȳ_b sin_b, ȳ_b cos_b - ȳ_a sin_a)

float32 inside, one rounding at the end. Letters: B batch, N heads, T tokens, D head_dim.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin of `rope` in plain PyTorch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x.to(wide) * cos.to(wide) + turned * sin.to(wide)).to(x.dtype)


if triton is not None:

    @triton.jit
    def rope_kernel(
        x_ptr, cos_ptr, sin_ptr, out_ptr, x_batch, x_head, x_token, tokens,
        N: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ):  # fmt: skip
        """Program: one token, all heads. x_batch, x_head, x_token: strides in elements; out [B, T, N, D] contiguous."""
        program = tl.program_id(0).to(tl.int64)
        batch, token = program // tokens, program % tokens
        n, lane = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
        inside, turning = (n < N) & (lane < HALF), lane < HALF
        table = token * 2 * HALF + lane
        cos_a = tl.load(cos_ptr + table, mask=turning, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + table, mask=turning, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + table + HALF, mask=turning, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + table + HALF, mask=turning, other=0.0).to(tl.float32)
        source = x_ptr + batch * x_batch + token * x_token + n * x_head + lane
        a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
        if BACKWARD:
            first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
        else:
            first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
        out = out_ptr + (program * N + n) * 2 * HALF + lane
        tl.store(out, first.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + HALF, second.to(out_ptr.dtype.element_ty), mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        rope_kernel[(batch * tokens,)](
            x, cos, sin, out, *x.stride()[:3], tokens, N=heads, HALF=dim // 2, BACKWARD=backward,
            BLOCK_N=triton.next_power_of_2(heads), BLOCK_HALF=triton.next_power_of_2(dim // 2), num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_outputs[0], cos, sin, backward=True), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, T, D] turned by tables [T, D], with its gradient; on kernels the memory's order is [B, T, N, D]. Raises ValueError for
    tables of another shape: heads turn whole."""
    if cos.shape != x.shape[-2:] or sin.shape != cos.shape:
        raise ValueError(f"x {tuple(x.shape)} wants tables {tuple(x.shape[-2:])}, not {tuple(cos.shape)}")
    if triton is None or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return rope_reference(x, cos, sin)
    return _Rope.apply(x, cos.contiguous(), sin.contiguous())
