"""Which device computes, in which dtype, within how much memory."""

from __future__ import annotations

import gc
import re
from functools import cache

import torch

from puzzle.base.errors import UserError
from puzzle.base.machine import available_memory, cpu_name, resident_memory

PLANNED = 0.9  # of the memory that is free


def pick_device(name: str, option: str = "device") -> torch.device:
    """'auto', 'cpu', 'cuda' or 'cuda:1'. Raises UserError, naming `option`, for another one and a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UserError(f"`{option}` {name}: use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise UserError(f"`{option}` {name}: no CUDA GPU is visible here; use `{option}` cpu or run where there is one")
    index, count = torch.device(name).index, torch.cuda.device_count()
    if (index or 0) >= count:
        raise UserError(f"`{option}` {name}: there are {count} here, the last is cuda:{count - 1}")
    return torch.device("cuda", torch.cuda.current_device() if index is None else index)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where graphs are warmed up and captured. One for all of them: cuBLAS keeps 34 MB for every stream that ever met it."""
    return torch.cuda.Stream(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def name_of(device: torch.device) -> str:
    """As cost tables call it: the GPU's name, or the processor's with its cores."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def short_name(device: torch.device) -> str:
    """The GPU's name, or "cpu" for any processor."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def wait_for(device: torch.device) -> None:
    """Until it has done what it was given, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held_memory(device: torch.device) -> int:
    """Bytes of the device that a limit counts and no plan does: on a CPU what the process holds already, torch and the
    interpreter first of all."""
    return 0 if device.type == "cuda" else resident_memory()


def device_memory(device: torch.device, limit: int | None) -> int:
    """Bytes that a plan may fill besides `held_memory`: 0.9 of what is free now, or of what is left of `limit`. What an earlier stage of
    this process left is let go first: an optimiser refers to itself, and a trainer's weights and graph would stay beside the next one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return int(PLANNED * min(free, free if limit is None else limit - held_memory(device)))


def this_gpu(gpu: str) -> str:
    """The name of the CUDA device that is to be `gpu`. Raises UserError when there is none that the kernels can use, with the driver's reason."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"`gpu` {gpu}: no CUDA device can be used here ({reason}): profile on the machine whose costs you want, or use "
            "`gpu` cpu"
        ) from error
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise UserError(f"{torch.cuda.get_device_name()} is sm_{major}{minor}: the kernels need sm_80 or newer")
    return torch.cuda.get_device_name()


def check_gpu(gpu: str) -> None:
    """Raises UserError unless `gpu` ("h100", "h100-sxm-80gb") names this machine's device."""
    here = this_gpu(gpu)
    if gpu.split("-")[0] not in here.lower():
        raise UserError(f"`gpu` {gpu}: this machine has {here}; a cost is measured where it will be paid")
