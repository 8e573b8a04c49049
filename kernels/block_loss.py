"""Normalised MSE of block outputs: loss = Σ (child - parent)² / Σ parent², and its gradient.

The forward pass reads both tensors once and leaves float32 partial sums, one pair per program, which a second tiny kernel
adds up in a fixed order (so equal inputs give equal bits). The gradient reads both once more and is
2 (child - parent) / Σ parent². Letters: E elements, P programs.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from puzzle.kernels.launch import num_processors

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the twin serves
    triton = None  # type: ignore[assignment]

SMALLEST = 1e-30  # of Σ parent², against a division by zero
MAX_PROGRAMS = 4096
FORWARD = {"BLOCK": 2048, "num_warps": 4, "programs_per_sm": 8}
BACKWARD = {"BLOCK": 2048, "num_warps": 4}


def block_loss_reference(child: Tensor, parent: Tensor) -> Tensor:
    """The twin of `block_loss` in plain PyTorch. float32 inside, float64 for float64 inputs."""
    wide = torch.promote_types(child.dtype, torch.float32)
    target = parent.to(wide)
    return (child.to(wide) - target).square().sum() / target.square().sum().clamp(min=SMALLEST)


def gradient_reference(child: Tensor, parent: Tensor, energy: Tensor) -> Tensor:
    """The twin of `output_gradient` in plain PyTorch."""
    wide = torch.promote_types(child.dtype, torch.float32)
    gap = child.to(wide) - parent.to(wide)
    return (gap * (2 / energy)).to(child.dtype)


if triton is not None:

    @triton.jit
    def partial_sums_kernel(child_ptr, parent_ptr, partial_ptr, num_elements, num_programs, BLOCK: tl.constexpr):
        """partial [2, P]: Σ (child - parent)² and Σ parent² over the blocks that a program visits."""
        program = tl.program_id(0)
        lanes = tl.arange(0, BLOCK)
        error = tl.zeros((BLOCK,), tl.float32)
        energy = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(program.to(tl.int64) * BLOCK, num_elements, tl.full((), BLOCK, tl.int64) * num_programs):
            at = start + lanes
            inside = at < num_elements
            target = tl.load(parent_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gap = tl.load(child_ptr + at, mask=inside, other=0.0).to(tl.float32) - target
            error += gap * gap
            energy += target * target
        tl.store(partial_ptr + program, tl.sum(error))
        tl.store(partial_ptr + num_programs + program, tl.sum(energy))

    @triton.jit
    def finish_kernel(
        partial_ptr, loss_ptr, energy_ptr, num_programs, SMALLEST_ENERGY: tl.constexpr, BLOCK: tl.constexpr
    ):
        """The scalars loss and energy (Σ parent²) from partial [2, P]."""
        at = tl.arange(0, BLOCK)
        error = tl.sum(tl.load(partial_ptr + at, mask=at < num_programs, other=0.0))
        energy = tl.sum(tl.load(partial_ptr + num_programs + at, mask=at < num_programs, other=0.0))
        energy = tl.maximum(energy, SMALLEST_ENERGY)
        tl.store(loss_ptr, error / energy)
        tl.store(energy_ptr, energy)

    @triton.jit
    def gradient_kernel(child_ptr, parent_ptr, energy_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
        """out [E] = 2 (child - parent) / energy."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_elements
        scale = 2.0 / tl.load(energy_ptr)
        target = tl.load(parent_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gap = tl.load(child_ptr + at, mask=inside, other=0.0).to(tl.float32) - target
        tl.store(out_ptr + at, (gap * scale).to(out_ptr.dtype.element_ty), mask=inside)


def _on_kernels(x: Tensor) -> bool:
    return triton is not None and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def loss_and_energy(child: Tensor, parent: Tensor, config: dict[str, int] = FORWARD) -> tuple[Tensor, Tensor]:
    """The loss and Σ parent², float32 scalars. Contiguous tensors of one shape, on a GPU or under the interpreter."""
    num_elements = child.numel()
    most = min(num_processors(child.device) * config["programs_per_sm"], MAX_PROGRAMS)
    num_programs = min(triton.cdiv(num_elements, config["BLOCK"]), most)
    partial = torch.empty(2, num_programs, dtype=torch.float32, device=child.device)
    loss = torch.empty((), dtype=torch.float32, device=child.device)
    energy = torch.empty_like(loss)
    partial_sums_kernel[(num_programs,)](
        child, parent, partial, num_elements, num_programs, BLOCK=config["BLOCK"], num_warps=config["num_warps"]
    )
    block = triton.next_power_of_2(num_programs)
    finish_kernel[(1,)](partial, loss, energy, num_programs, SMALLEST_ENERGY=SMALLEST, BLOCK=block, num_warps=4)
    return loss, energy


def gradient(child: Tensor, parent: Tensor, energy: Tensor, config: dict[str, int] = BACKWARD) -> Tensor:
    """d loss / d child, in the dtype of child; energy from `loss_and_energy`."""
    out = torch.empty_like(child)
    grid = (triton.cdiv(child.numel(), config["BLOCK"]),)
    gradient_kernel[grid](
        child, parent, energy, out, child.numel(), BLOCK=config["BLOCK"], num_warps=config["num_warps"]
    )
    return out


def block_loss(child: Tensor, parent: Tensor) -> Tensor:
    """Σ (child - parent)² / Σ parent² as a float32 scalar: 1 for a block whose output is zero.

    child and parent have one shape; their dtypes may differ (bf16, fp16, fp32). Without autograd: `output_gradient` is its gradient.
    Never waits for the device, so a CUDA graph can hold it. Raises ValueError for shapes that differ.
    """
    if child.shape != parent.shape or child.numel() == 0:
        raise ValueError(f"child {tuple(child.shape)} and parent {tuple(parent.shape)} must have one non-empty shape")
    if not _on_kernels(child):
        return block_loss_reference(child, parent)
    with torch.cuda.device_of(child):  # Triton launches on the current device
        return loss_and_energy(child.contiguous(), parent.contiguous())[0]


def energy(parent: Tensor) -> Tensor:
    """Σ parent², a scalar as `output_gradient` wants it."""
    if not _on_kernels(parent):
        return parent.to(torch.promote_types(parent.dtype, torch.float32)).square().sum().clamp(min=SMALLEST)
    parent = parent.contiguous()
    with torch.cuda.device_of(parent):
        return loss_and_energy(parent, parent)[1]


def output_gradient(child: Tensor, parent: Tensor, energy: Tensor) -> Tensor:
    """d block_loss / d child, like child, in one pass; energy: of the parent, by `energy`."""
    if not _on_kernels(child):
        return gradient_reference(child, parent, energy)
    with torch.cuda.device_of(child):
        return gradient(child.contiguous(), parent.contiguous(), energy)
