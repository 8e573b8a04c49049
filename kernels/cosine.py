"""1 - cosine of the angle between rows, and its gradient, each in one pass over memory.

    d = c·p / (|c| |p|)      ∂(1 - d)/∂c = c d / |c|² - p / (|c| |p|)

float32 inside, float64 for float64 inputs. What it keeps are c and p as they are and two numbers a row: F.cosine_similarity keeps
float32 copies of both and moves three times the bytes. Letters: R rows (all leading dimensions), H hidden_size.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from puzzle.kernels.launch import row_sizes

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

SMALLEST = 1e-8  # of a norm, as torch's cosine similarity has it


def distance_reference(child: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 - d, d / |c|² and 1 / (|c| |p|), in plain PyTorch. [..., H] twice -> [...] thrice"""
    wide = torch.promote_types(child.dtype, torch.float32)
    dot = (child.to(wide) * teacher).sum(-1, dtype=wide)
    own, other = (torch.linalg.vector_norm(x, dim=-1, dtype=wide).clamp(min=SMALLEST) for x in (child, teacher))
    cosine = dot / (own * other)
    return 1 - cosine, cosine / own.square(), 1 / (own * other)


def gradient_reference(child: Tensor, teacher: Tensor, grad: Tensor, to_child: Tensor, to_teacher: Tensor) -> Tensor:
    """Of the sum of grad · (1 - d), like child, in plain PyTorch."""
    own, other = (grad * to_child)[..., None], (grad * to_teacher)[..., None]
    return (child * own - teacher * other).to(child.dtype)


if triton is not None:

    @triton.jit
    def cosine_kernel(
        child_ptr, teacher_ptr, out_ptr, to_child_ptr, to_teacher_ptr, num_rows,
        H: tl.constexpr, LEAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """Program: BLOCK_R rows. child, teacher [R, H] contiguous, the others [R] float32."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tl.arange(0, BLOCK_H)[None, :]
        at, inside = row[:, None] * H + column, (row[:, None] < num_rows) & (column < H)
        child = tl.load(child_ptr + at, mask=inside, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_ptr + at, mask=inside, other=0.0).to(tl.float32)
        own = tl.maximum(tl.sqrt_rn(tl.sum(child * child, axis=1)), LEAST)
        both = own * tl.maximum(tl.sqrt_rn(tl.sum(teacher * teacher, axis=1)), LEAST)
        cosine = tl.sum(child * teacher, axis=1) / both
        tl.store(out_ptr + row, 1.0 - cosine, mask=row < num_rows)
        tl.store(to_child_ptr + row, cosine / (own * own), mask=row < num_rows)
        tl.store(to_teacher_ptr + row, 1.0 / both, mask=row < num_rows)

    @triton.jit
    def cosine_gradient_kernel(
        child_ptr, teacher_ptr, grad_ptr, to_child_ptr, to_teacher_ptr, out_ptr, num_rows,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """Program: BLOCK_R rows. child, teacher, out [R, H] contiguous, the others [R] float32."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        column = tl.arange(0, BLOCK_H)[None, :]
        at, inside = row * H + column, (row < num_rows) & (column < H)
        grad = tl.load(grad_ptr + row, mask=row < num_rows, other=0.0)
        own = grad * tl.load(to_child_ptr + row, mask=row < num_rows, other=0.0)
        other = grad * tl.load(to_teacher_ptr + row, mask=row < num_rows, other=0.0)
        child = tl.load(child_ptr + at, mask=inside, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (child * own - teacher * other).to(out_ptr.dtype.element_ty), mask=inside)


def _on_kernels(x: Tensor) -> bool:
    there = triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")
    return there and x.numel() > 0 and x.dtype != torch.float64


class _CosineDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, child: Tensor, teacher: Tensor) -> Tensor:
        if not _on_kernels(child):
            out, *kept = distance_reference(child, teacher)
        else:
            child, teacher = child.contiguous(), teacher.contiguous()
            out, *kept = torch.empty(3, *child.shape[:-1], dtype=torch.float32, device=child.device)
            sizes = row_sizes(child.shape[-1])
            with torch.cuda.device_of(child):  # Triton launches on the current device
                cosine_kernel[(triton.cdiv(out.numel(), sizes["BLOCK_R"]),)](
                    child, teacher, out, *kept, out.numel(), LEAST=SMALLEST, **sizes
                )
        ctx.save_for_backward(child, teacher, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        child, teacher, *kept = ctx.saved_tensors
        [grad] = grad_outputs
        if not _on_kernels(child):
            return gradient_reference(child, teacher, grad, *kept), None
        out, sizes = torch.empty_like(child), row_sizes(child.shape[-1])
        with torch.cuda.device_of(child):
            cosine_gradient_kernel[(triton.cdiv(grad.numel(), sizes["BLOCK_R"]),)](
                child, teacher, grad.contiguous(), *kept, out, grad.numel(), **sizes
            )
        return out, None


def cosine_distance(child: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of the angle between hidden states, in float32 at least; `teacher` learns nothing. [..., H] twice -> [...]

    Raises ValueError for shapes that differ.
    """
    if child.shape != teacher.shape:
        raise ValueError(f"child {tuple(child.shape)} and teacher {tuple(teacher.shape)} must have one shape")
    with torch.autocast(child.device.type, enabled=False):
        return _CosineDistance.apply(child, teacher)
