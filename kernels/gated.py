"""silu(gate) · up and its gradients for training, each in one pass over memory (arXiv 2002.05202).

float32 inside, one rounding at the end. Letters: E elements.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

CONFIG = {"BLOCK": 2048, "num_warps": 8}


def gated_silu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The twin of `gated_silu` in plain PyTorch."""
    return F.silu(gate) * up


if triton is not None:

    @triton.jit
    def gated_kernel(gate_ptr, up_ptr, out_ptr, num, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def gated_backward_kernel(
        gate_ptr, up_ptr, grad_ptr, gate_grad_ptr, up_grad_ptr, num, BLOCK: tl.constexpr
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        slope = share * (1.0 + gate * (1.0 - share))
        tl.store(gate_grad_ptr + at, (grad * up * slope).to(gate_grad_ptr.dtype.element_ty), mask=inside)
        tl.store(up_grad_ptr + at, (grad * gate * share).to(up_grad_ptr.dtype.element_ty), mask=inside)


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out, num = torch.empty_like(gate), gate.numel()
        with torch.cuda.device_of(gate):  # Triton launches on the current device
            gated_kernel[(triton.cdiv(num, CONFIG["BLOCK"]),)](gate, up, out, num, **CONFIG)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads, num = (torch.empty_like(gate), torch.empty_like(up)), gate.numel()
        grid = (triton.cdiv(num, CONFIG["BLOCK"]),)
        with torch.cuda.device_of(gate):
            gated_backward_kernel[grid](gate, up, grad_outputs[0].contiguous(), *grads, num, **CONFIG)
        return grads


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of one shape and dtype, with gradients for both. Raises ValueError for shapes that differ."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    if triton is None or not (gate.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return gated_silu_reference(gate, up)
    return _GatedSilu.apply(gate.contiguous(), up.contiguous())
