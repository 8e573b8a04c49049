"""One model on several processes, as `torchrun` starts them: who this process is, and on which device."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from puzzle.base.console import console
from puzzle.base.errors import UserError
from puzzle.blocklib.fast.ranks import Ranks

TIMEOUT = timedelta(seconds=600)  # of a sum: a rank that failed does not keep the others for ever
NCCL = ("NCCL_ALGO", "NCCL_NVLS_ENABLE", "NCCL_PROTO")  # what changes the time of an all-reduce


@contextmanager
def joined(tp: int, gpu: str) -> Iterator[tuple[Ranks | None, torch.device]]:
    """This process among `tp`, over NCCL, or on a CPU over gloo; only the first one speaks. They part at the end. None: it is alone.

    Raises UserError for another number of processes, or without a GPU for each.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if world != tp:
        told = "1 process was" if world == 1 else f"{world} processes were"
        raise UserError(f"`tp` {tp}: {told} started: start {tp}, by `torchrun --nproc-per-node {tp} -m puzzle ...`")
    device = torch.device("cpu" if gpu == "cpu" else "cuda")
    if tp == 1:
        yield None, device
        return
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"`tp` {tp}: process {local} has no GPU of its own ({torch.cuda.device_count()} here)")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    console.quiet = int(os.environ.get("RANK", "0")) > 0
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    yield Ranks(rank=dist.get_rank(), world=tp), device
    gc.collect()  # NCCL waits for every graph that holds one of its sums
    dist.destroy_process_group()  # not after an error, which ends this process and with it the others: it would wait for them


def nccl_words(device: torch.device) -> str:
    """Version and switches of NCCL, to stand behind torch's."""
    if device.type != "cuda":
        return ""
    switches = "".join(f"; {name}={os.environ[name]}" for name in NCCL if name in os.environ)
    return f"; nccl {'.'.join(map(str, torch.cuda.nccl.version()))}{switches}"
