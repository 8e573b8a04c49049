"""One model on several processes: each runs its share of every sub-block, and their contributions are summed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from puzzle.base.device import pick_device
from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks, running_ranks

NCCL = ("NCCL_ALGO", "NCCL_NVLS_ENABLE", "NCCL_PROTO")  # what changes the time of an all-reduce


@contextmanager
def joined(tp: int, gpu: str) -> Iterator[tuple[Ranks | None, torch.device]]:
    """This process among `tp`, which sum over NCCL, or on a CPU over gloo. None: it is alone.

    Raises UserError for another number of processes, or without a GPU for each.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != tp:
        told = "1 process was" if world == 1 else f"{world} processes were"
        raise UserError(f"`tp` {tp}: {told} started: start {tp}, by `torchrun --nproc-per-node {tp} -m puzzle ...`")
    device = torch.device("cpu" if gpu == "cpu" else "cuda")
    if tp == 1:
        yield None, device
        return
    pick_device(device.type, "gpu")
    with running_ranks(device.type) as ranks:
        ranks.sum(torch.zeros(1, device=ranks.device))  # makes NCCL's links, before a graph holds a sum
        yield ranks, ranks.device
        gc.collect()  # NCCL waits for every graph that holds one of its sums


def own_rows(ranks: Ranks, table: Tensor, count: int) -> Tensor:
    """This rank's `count` rows of an embedding or a head. Rows beyond the last repeat it: the first of equal logits wins."""
    at = torch.arange(ranks.rank * count, (ranks.rank + 1) * count).clamp(max=len(table) - 1)
    return table[at.to(table.device)]


def among_own_rows(ranks: Ranks, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which of this rank's `rows` rows are asked for, and [N, 1] whether they are its own. ids [N] of the whole vocabulary"""
    own = ids - ranks.rank * rows
    return own.clamp(0, rows - 1), ((own >= 0) & (own < rows))[:, None]


def best_word(ranks: Ranks, logits: Tensor) -> Tensor:
    """The word with the largest logit, where every rank has those of its own rows. [B, rows] -> [B]"""
    value, word = logits.max(-1)
    every = torch.zeros(ranks.world, 2, len(logits), device=logits.device)  # float32 holds every word's number
    every[ranks.rank] = torch.stack((value.float(), (word + ranks.rank * logits.shape[-1]).float()))
    values, words = ranks.sum(every).unbind(1)
    return words.gather(0, values.argmax(0)[None])[0].long()


def nccl_words(device: torch.device) -> str:
    """Version and switches of NCCL, to stand behind torch's."""
    if device.type != "cuda":
        return ""
    switches = "".join(f"; {name}={os.environ[name]}" for name in NCCL if name in os.environ)
    return f"; nccl {'.'.join(map(str, torch.cuda.nccl.version()))}{switches}"
