"""One AdamW step of a sub-block's weights in two passes over memory, with clipping and the copies that products read.

A matrix W that reads x̂ · s, x̂ normed without a scale and s the norm's scale, may be kept as W diag(s), so that no product of the
backward pass reaches the input. With R = gᵀ x̂, the gradient of that copy,

    dW = R diag(s)      ds = Σ_rows R ∘ W

The first pass reads R (and W) and gives the norm of all gradients and ds; the second updates masters, moments and copies (AdamW, arXiv
1711.05101, as torch.optim.AdamW computes it). A step with a non-finite gradient changes nothing. Nothing waits for the
device. Letters: R rows, C columns, P programs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

EPS = 1e-8
STRIPES, TILE = 64, {"BLOCK_R": 8, "BLOCK_C": 256}  # of the first pass
UPDATE = {"BLOCK": 1024, "num_warps": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """AdamW's numbers. lr: a scalar tensor on the device."""

    lr: Tensor
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """One tensor in training. value: its master; mean, square: AdamW's moments, like it. copy: the same in the dtype of the products,
    where it is another tensor; scaled: the copy's columns are multiplied with the norm's scale."""

    value: Tensor
    mean: Tensor
    square: Tensor
    copy: Tensor | None = None
    scaled: bool = False

    def refresh(self, scale: Tensor | None) -> None:
        """Make the copy anew. scale [C] of the columns, where it is scaled."""
        if self.copy is not None:
            self.copy.copy_(self.value if scale is None or not self.scaled else self.value * scale)


def adamw_reference(
    weights: Sequence[Weight], grads: Sequence[Tensor], norm: Weight | None, offset: float, steps: Tensor, rule: Rule
) -> None:
    """The twin of `adamw` in plain PyTorch."""
    weights, grads = list(weights), [g.to(w.value.dtype) for w, g in zip(weights, grads, strict=True)]
    if norm is not None:
        pairs = list(zip(weights, grads, strict=True))
        slope = torch.stack([(g * w.value).sum(dim=0) for w, g in pairs if w.scaled]).sum(dim=0)
        scale = norm.value + offset
        grads = [*(g * scale if w.scaled else g for w, g in pairs), slope]
        weights = [*weights, norm]
    total = torch.stack([g.norm() for g in grads]).norm()
    coefficient = (rule.clip_norm / (total + 1e-6)).clamp(max=1)
    counts = [steps.clone() for _ in weights]
    torch_adamw(
        [w.value for w in weights], [g * coefficient for g in grads], [w.mean for w in weights],
        [w.square for w in weights], [], counts, fused=True, amsgrad=False, maximize=False, lr=rule.lr,
        beta1=rule.beta1, beta2=rule.beta2, weight_decay=rule.weight_decay, eps=EPS,
        found_inf=(~torch.isfinite(total)).float(),
    )  # fmt: skip
    steps.copy_(counts[0])
    for weight in weights:
        weight.refresh(None if norm is None else norm.value + offset)


if triton is not None:

    @triton.jit
    def sums_kernel(
        grad_ptr, value_ptr, scale_ptr, square_ptr, slope_ptr, rows, columns, offset,
        SCALED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    ):  # fmt: skip
        """Program (column block, stripe of rows): square [P] += Σ (R s)², slope [stripes, C] = Σ_rows R ∘ W."""
        stripe, stripes = tl.program_id(1), tl.num_programs(1)
        c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = c < columns
        squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        slopes = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for begin in tl.range(stripe * BLOCK_R, rows, stripes * BLOCK_R):
            r = begin + tl.arange(0, BLOCK_R)
            at = r.to(tl.int64)[:, None] * columns + c[None, :]
            mask = (r < rows)[:, None] & inside[None, :]
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            squares += grad * grad
            if SCALED:
                slopes += grad * tl.load(value_ptr + at, mask=mask, other=0.0)
        total = tl.sum(squares, axis=0)
        if SCALED:
            scale = tl.load(scale_ptr + c, mask=inside, other=0.0) + offset
            total = total * scale * scale
            tl.store(slope_ptr + stripe * columns + c, tl.sum(slopes, axis=0), mask=inside)
        tl.store(square_ptr + stripe * tl.num_programs(0) + tl.program_id(0), tl.sum(total))

    @triton.jit
    def clip_kernel(square_ptr, factors_ptr, steps_ptr, num, beta1, beta2, clip_norm, BLOCK: tl.constexpr):
        """factors: of the gradients, of the step, of the root of the second moment; steps: one more, if all is finite. The first
        factor is NaN if not."""
        sums = tl.zeros((BLOCK,), tl.float32)
        for begin in tl.range(0, num, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            sums += tl.load(square_ptr + at, mask=at < num, other=0.0)
        total = tl.sqrt_rn(tl.sum(sums))
        finite = total < float("inf")
        steps = tl.load(steps_ptr) + tl.where(finite, 1.0, 0.0)
        tl.store(steps_ptr, steps)
        coefficient = tl.minimum(clip_norm / (total + 1e-6), 1.0)
        tl.store(factors_ptr, tl.where(finite, coefficient, float("nan")))
        tl.store(factors_ptr + 1, 1.0 / (1.0 - tl.exp2(steps * tl.log2(beta1 + 0.0 * total))))
        tl.store(factors_ptr + 2, 1.0 / tl.sqrt_rn(1.0 - tl.exp2(steps * tl.log2(beta2 + 0.0 * total))))

    @triton.jit
    def update_kernel(
        value_ptr, mean_ptr, square_ptr, grad_ptr, copy_ptr, old_ptr, new_ptr, factors_ptr, lr_ptr,
        columns, blocks, offset, beta1, beta2, decay, eps,
        SCALED: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Program: a block of one row. old, new [C]: the norm's weight before and after this step."""
        coefficient = tl.load(factors_ptr)
        if coefficient == coefficient:
            program = tl.program_id(0)
            c = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
            inside = c < columns
            at = (program // blocks).to(tl.int64) * columns + c
            lr = tl.load(lr_ptr)
            grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * coefficient
            if SCALED:
                grad = grad * (tl.load(old_ptr + c, mask=inside, other=0.0) + offset)
            value = tl.load(value_ptr + at, mask=inside, other=0.0) * (1.0 - lr * decay)
            mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
            mean = mean + (1.0 - beta1) * (grad - mean)
            square = tl.load(square_ptr + at, mask=inside, other=0.0)
            square = beta2 * square + (1.0 - beta2) * grad * grad
            root = tl.sqrt_rn(square) * tl.load(factors_ptr + 2) + eps
            value = value - lr * tl.load(factors_ptr + 1) * mean / root
            tl.store(value_ptr + at, value, mask=inside)
            tl.store(mean_ptr + at, mean, mask=inside)
            tl.store(square_ptr + at, square, mask=inside)
            if COPY:
                if SCALED:
                    value = value * (tl.load(new_ptr + c, mask=inside, other=0.0) + offset)
                tl.store(copy_ptr + at, value.to(copy_ptr.dtype.element_ty), mask=inside)


def adamw(
    weights: Sequence[Weight], grads: Sequence[Tensor], norm: Weight | None, offset: float, steps: Tensor, rule: Rule
) -> None:
    """One step of all `weights`, in place, their gradients clipped together.

    grads: of the copies, like them; any float dtype. norm: the weight of the norm before, whose scale `offset` + value is in the copies
    that are `scaled`; None: no copy is. It takes its step with them. steps: done so far, a float32 scalar on the device.
    """
    if triton is None or not (steps.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        adamw_reference(weights, grads, norm, offset, steps, rule)
        return
    device, every = steps.device, [*weights, *([norm] if norm is not None else [])]
    shapes = [(w.value.numel() // w.value.shape[-1], w.value.shape[-1]) for w in every]
    grids = [(triton.cdiv(c, TILE["BLOCK_C"]), min(STRIPES, triton.cdiv(r, TILE["BLOCK_R"]))) for r, c in shapes]
    squares = torch.empty(sum(a * b for a, b in grids), dtype=torch.float32, device=device)
    scaled = [grid[1] if w.scaled else 0 for w, grid in zip(every, grids, strict=True)]
    slopes = torch.empty(sum(scaled), shapes[-1][1], dtype=torch.float32, device=device)
    scale = slopes if norm is None else norm.value
    grads, slope_row, square_at = [g.contiguous() for g in grads], 0, 0
    for index, (weight, (r, c), grid) in enumerate(zip(every, shapes, grids, strict=True)):
        if index == len(grads):
            grads.append(slopes.sum(dim=0))
        sums_kernel[grid](
            grads[index], weight.value, scale, squares[square_at:], slopes[slope_row:], r, c, offset,
            SCALED=weight.scaled, **TILE, num_warps=4,
        )  # fmt: skip
        slope_row, square_at = slope_row + scaled[index], square_at + grid[0] * grid[1]
    factors = torch.empty(3, dtype=torch.float32, device=device)
    clip_kernel[(1,)](
        squares, factors, steps, len(squares), rule.beta1, rule.beta2, rule.clip_norm, BLOCK=1024, num_warps=4
    )
    old = scale if norm is None else scale.clone()
    for weight, grad, (r, c) in reversed(list(zip(every, grads, shapes, strict=True))):  # the norm first
        copy = weight.value if weight.copy is None else weight.copy
        blocks = triton.cdiv(c, UPDATE["BLOCK"])
        update_kernel[(r * blocks,)](
            weight.value, weight.mean, weight.square, grad, copy, old, scale, factors, rule.lr,
            c, blocks, offset, rule.beta1, rule.beta2, rule.weight_decay, EPS,
            SCALED=weight.scaled, COPY=weight.copy is not None, **UPDATE,
        )  # fmt: skip
