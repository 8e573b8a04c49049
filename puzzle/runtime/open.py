"""Which runtime a device has: our kernels on a GPU, plain PyTorch on a CPU. Prices and measurements use the same."""

from __future__ import annotations

import torch

from puzzle.base.errors import UserError
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.interface import Runtime
from puzzle.runtime.model import CausalModel
from puzzle.runtime.plain import PlainRuntime

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of what is not quantised


def usual_precision(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "float32"


def open_runtime(model: CausalModel, batch: int, max_length: int, precision: str, *, consume: bool = False) -> Runtime:
    """consume: the model is used up where that spares memory. Raises UserError for a precision that the device has no runtime for."""
    device = model.embedding.weight.device
    if device.type != "cuda":
        if precision != "float32":
            raise UserError(f"precision {precision} has no runtime on a CPU: float32 has")
        return PlainRuntime(model, batch, max_length)
    if precision not in ("bf16", "fp8"):
        raise UserError(f"precision {precision} has no runtime on a GPU: bf16 and fp8 have")
    return FastRuntime(model, batch, max_length, fp8=precision == "fp8", consume=consume)
