"""Residual add and RMSNorm in one pass over memory: each input is read once, each output written once.

    s = x + residual            rounded to the dtype of x, as Hugging Face models do; it is the next residual
    y = s / sqrt(mean(s²) + eps) · weight

float32 inside; y is rounded before and after the product with the weight, again as Hugging Face models do
(arXiv 1910.07467). Letters: R rows (all leading dimensions), H hidden_size.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from puzzle.kernels.overlap import launch_options

try:
    import triton
    import triton.language as tl

    from puzzle.kernels.overlap import follow
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

# (largest H, warps per row)
NUM_WARPS = ((512, 1), (2048, 2), (4096, 4), (8192, 8), (65536, 16))


def rms_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The twin of `rms_norm` in plain PyTorch: same arguments, same results up to rounding."""
    stream = x if residual is None else x + residual
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)
    return (normed if weight is None else normed * weight.to(x.dtype)), stream


if triton is not None:

    @triton.jit
    def rms_norm_kernel(
        x_ptr, residual_ptr, weight_ptr, out_ptr, stream_ptr, eps,
        H: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_H: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        """One program per row. x, residual, out, stream: [R, H] contiguous; weight: [H]."""
        follow(PDL)
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK_H)
        inside = columns < H
        at = row * H + columns
        stream = tl.load(x_ptr + at, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            total = stream.to(tl.float32) + tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
            stream = total.to(stream_ptr.dtype.element_ty)
            tl.store(stream_ptr + at, stream, mask=inside)
        wide = stream.to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(wide * wide) / H + eps)
        normed = (wide * scale).to(out_ptr.dtype.element_ty)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(out_ptr.dtype.element_ty)
            normed = (normed.to(tl.float32) * weight.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, normed, mask=inside)


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    *,
    out: Tensor | None = None,
    stream_out: Tensor | None = None,
    num_warps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """x [..., H], residual like x or None, weight [H] or None (unit scale) -> (normed, new residual), both like x.

    out, stream_out: where the results go, contiguous; either may be an input (each row is read before it is written).
    Without a residual the second result is x itself. Inference only: when x or the residual wants a gradient, the twin
    runs instead. Raises ValueError for shapes that do not fit.
    """
    hidden = x.shape[-1]
    if (residual is not None and residual.shape != x.shape) or (weight is not None and weight.shape != (hidden,)):
        raise ValueError(
            f"x {tuple(x.shape)} wants a residual of the same shape and a weight [{hidden}], not "
            f"{None if residual is None else tuple(residual.shape)} and {None if weight is None else tuple(weight.shape)}"
        )
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight))
    if triton is None or wants_grad or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        normed, stream = rms_norm_reference(x, residual, weight, eps)
        normed = normed if out is None else out.copy_(normed)
        return normed, (stream if stream_out is None or residual is None else stream_out.copy_(stream))
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x) if out is None else out
    stream = x if residual is None else (torch.empty_like(x) if stream_out is None else stream_out)
    rms_norm_kernel[(x.numel() // hidden,)](
        x, residual, weight, out, stream, eps,
        H=hidden, HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
        BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=num_warps or next(warps for limit, warps in NUM_WARPS if hidden <= limit),
        **launch_options(x.device),
    )  # fmt: skip
    return out, stream
