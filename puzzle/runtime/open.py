"""Which runtime a device has: our kernels on a GPU, plain PyTorch on a CPU. Prices and measurements use the same."""

from __future__ import annotations

import torch

from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.interface import Fp8, Runtime
from puzzle.runtime.model import CausalModel
from puzzle.runtime.plain import PlainRuntime

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}  # of what is not quantised


RUN_HERE = {"cpu": ("float32",), "cuda": ("bf16", "fp8")}  # precisions by device, the usual one first


def pick_precision(device: torch.device, priced: str | None = None) -> str:
    """The one that was priced, where the device has a runtime for it; else the usual one."""
    return priced if priced in RUN_HERE[device.type] else RUN_HERE[device.type][0]


def open_runtime(
    model: CausalModel,
    batch: int,
    max_length: int,
    precision: str,
    *,
    fp8: Fp8 | None = None,
    consume: bool = False,
    ranks: Ranks | None = None,
) -> Runtime:
    """ranks: of which the model is one's share; on a CPU the kernels' plain twins run then. fp8: what of it is, where not all is in one precision. consume: the model is used up where that spares memory. Raises UserError for a precision that the device has no runtime for."""
    device = model.embedding.weight.device
    if device.type != "cuda":
        if precision not in RUN_HERE["cpu"]:
            raise UserError(f"precision {precision} has no runtime on a CPU: float32 has")
        return (
            PlainRuntime(model, batch, max_length)
            if ranks is None
            else FastRuntime(model, batch, max_length, ranks=ranks)
        )
    if precision not in RUN_HERE["cuda"]:
        raise UserError(f"precision {precision} has no runtime on a GPU: bf16 and fp8 have")
    return FastRuntime(model, batch, max_length, fp8=fp8 or precision == "fp8", consume=consume, ranks=ranks)
