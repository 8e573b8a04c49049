"""RMSNorm for training, forward and backward in one pass over memory each (arXiv 1910.07467).

    r = 1 / sqrt(mean(x²) + eps)        y = x r · w, or with an offset x r · (1 + w)
    x̄ = r (g - x r · mean(g · x r))     g = ȳ · w          w̄ = Σ over rows of ȳ · x r

float32 inside; without an offset x r and w are rounded to the dtype of x before they meet, as in Hugging Face's Llama, with one
nothing is before the end, as in its Gemma. Sums over rows are in a fixed order. Letters: R rows (all leading dimensions), H hidden_size,
P programs.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from puzzle.kernels.launch import num_processors, row_sizes
from puzzle.kernels.rmsnorm import rms_norm_reference

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

PROGRAMS_PER_SM = 4


def trained_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """The twin of `trained_norm` in plain PyTorch. float32 inside, float64 for float64 inputs."""
    if not offset:
        return rms_norm_reference(x, None, weight, eps)[0]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return rms_norm_reference(wide, None, 1 + weight.to(wide.dtype), eps)[0].to(x.dtype)


if triton is not None:

    @triton.jit
    def scale_of(weight_ptr, columns, H: tl.constexpr, OFFSET: tl.constexpr, dtype: tl.constexpr):
        """What x r is multiplied with [BLOCK_H]."""
        weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
        return weight + 1.0 if OFFSET else weight.to(dtype).to(tl.float32)

    @triton.jit
    def norm_kernel(
        x_ptr, weight_ptr, out_ptr, num_rows, eps,
        H: tl.constexpr, OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """Program: BLOCK_R rows. x, out [R, H] contiguous, weight [H]."""
        dtype = out_ptr.dtype.element_ty
        rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        columns = tl.arange(0, BLOCK_H)
        at, inside = rows * H + columns[None, :], (rows < num_rows) & (columns[None, :] < H)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / H + eps))[:, None]
        normed = normed if OFFSET else normed.to(dtype).to(tl.float32)
        out = normed * scale_of(weight_ptr, columns, H, OFFSET, dtype)[None, :]
        tl.store(out_ptr + at, out.to(dtype), mask=inside)

    @triton.jit
    def norm_backward_kernel(
        x_ptr, weight_ptr, grad_ptr, x_grad_ptr, partial_ptr, num_rows, num_programs, eps,
        H: tl.constexpr, OFFSET: tl.constexpr, OF_X: tl.constexpr, OF_WEIGHT: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """Program: every num_programs-th block of BLOCK_R rows. x, grad, x_grad [R, H] contiguous; partial [P, H]: its sum over rows."""
        dtype = x_ptr.dtype.element_ty
        program = tl.program_id(0)
        columns = tl.arange(0, BLOCK_H)
        scale = scale_of(weight_ptr, columns, H, OFFSET, dtype)[None, :]
        total = tl.zeros((BLOCK_H,), tl.float32)
        first, stride = program.to(tl.int64) * BLOCK_R, tl.full((), BLOCK_R, tl.int64) * num_programs
        for begin in tl.range(first, num_rows, stride):
            rows = begin + tl.arange(0, BLOCK_R)[:, None]
            at, inside = rows * H + columns[None, :], (rows < num_rows) & (columns[None, :] < H)
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
            size = (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / H + eps))[:, None]
            normed = x * size
            if OF_WEIGHT:
                met = normed if OFFSET else normed.to(dtype).to(tl.float32)
                total += tl.sum(grad * met, axis=0)
            if OF_X:
                grad = grad * scale
                along = (tl.sum(grad * normed, axis=1) / H)[:, None]
                tl.store(x_grad_ptr + at, (size * (grad - normed * along)).to(dtype), mask=inside)
        if OF_WEIGHT:
            tl.store(partial_ptr + program * H + columns, total, mask=columns < H)


class _TrainedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        out, sizes = torch.empty_like(x), row_sizes(x.shape[-1])
        rows = x.numel() // x.shape[-1]
        with torch.cuda.device_of(x):  # Triton launches on the current device
            norm_kernel[(triton.cdiv(rows, sizes["BLOCK_R"]),)](x, weight, out, rows, eps, OFFSET=offset, **sizes)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad[:2]
        hidden, sizes = x.shape[-1], row_sizes(x.shape[-1])
        rows = x.numel() // hidden
        programs = min(triton.cdiv(rows, sizes["BLOCK_R"]), PROGRAMS_PER_SM * num_processors(x.device))
        x_grad = torch.empty_like(x) if of_x else x
        partial = torch.empty(programs if of_weight else 0, hidden, dtype=torch.float32, device=x.device)
        with torch.cuda.device_of(x):
            norm_backward_kernel[(programs,)](
                x, weight, grad_outputs[0].contiguous(), x_grad, partial, rows, programs, ctx.eps,
                OFFSET=ctx.offset, OF_X=of_x, OF_WEIGHT=of_weight, **sizes,
            )  # fmt: skip
        return x_grad if of_x else None, partial.sum(0).to(weight.dtype) if of_weight else None, None, None


def trained_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """x [..., H] over its root mean square, times weight [H] (of any dtype), or 1 + weight with `offset`; like x, with gradients for both.

    Raises ValueError for a weight of another size.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"x {tuple(x.shape)} wants a weight [{x.shape[-1]}], not {list(weight.shape)}")
    if (
        triton is None
        or not x.numel()
        or x.dtype == torch.float64
        or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    ):
        return trained_norm_reference(x, weight, eps, offset)
    return _TrainedNorm.apply(x.contiguous(), weight.contiguous(), eps, offset)
