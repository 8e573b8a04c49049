"""One process or many, as `torchrun` starts them: who this process is, what all say to each other, and how all end when one fails.

What processes say to each other goes through gloo on the CPU; tensors on a GPU go through NCCL.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from puzzle.base.console import console
from puzzle.base.device import device_memory, pick_device
from puzzle.base.errors import UserError, first_line
from puzzle.base.lock import holding

T = TypeVar("T")

# Of one process for another; the longest wait is for the first one to write a large child.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """rank of world processes, `here` of them on this host, on `device`. One process alone says nothing to anybody."""

    rank: int = 0
    world: int = 1
    here: int = 1
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank; all must call it."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def slowest(self, seconds: Sequence[float]) -> list[float]:
        """The largest of each over all processes, so that all go on alike."""
        return [max(every) for every in zip(*self.gather(seconds), strict=True)]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all: files that may change are read by one, so that no two see different ones."""
        if self.world == 1:
            return make()
        found = [make() if self.is_first else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all have come here."""
        self.gather(None)

    def agree(self, read: Callable[[], T], what: str, seconds: float = 120) -> T:
        """What `read` finds in files, as all processes see it: where a network file system is behind, they read again.

        Raises UserError where they see different things for so long. what: its name in the message.
        """
        until = time.monotonic() + seconds
        while True:
            value = read()
            found = self.gather((value, time.monotonic() > until))
            other = next((rank for rank, (one, _) in enumerate(found) if one != found[0][0]), None)
            if other is None:
                return value
            if found[0][1]:
                raise UserError(f"process {other} sees another {what} than the first: give all hosts the same files")
            time.sleep(1)

    def memory(self, limit: int | None) -> int:
        """`device_memory`, the least of all processes; those of one host share its CPU."""
        free = device_memory(self.device, limit)
        if self.world == 1:
            return free
        if self.device.type == "cpu":
            free = min(free, device_memory(self.device, None) // self.here)
        return min(self.gather(free))

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's stretch of `items`; those of all, by rank, are `items` again."""
        begin, end = (len(items) * n // self.world for n in (self.rank, self.rank + 1))
        return items[begin:end]


def start_ranks(device: str) -> Ranks:
    """This process as `torchrun` describes it in the environment, or alone. Raises UserError for a missing device, and where
    processes were started with different arguments."""
    world, on = int(os.environ.get("WORLD_SIZE", "1")), pick_device(device)
    if world == 1:
        return Ranks(device=on)
    if on.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if device not in ("auto", "cuda"):
            raise UserError(f"`device` {device} with {world} processes: each takes a GPU of its own; use cuda")
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} has no GPU of its own ({torch.cuda.device_count()} here): start fewer")
        on = torch.device("cuda", local)
        torch.cuda.set_device(on)
    starts, here = not dist.is_initialized(), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if starts:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on.type == "cuda" else "gloo", timeout=TIMEOUT)
    console.quiet = dist.get_rank() > 0
    ranks = Ranks(rank=dist.get_rank(), world=world, here=here, device=on)
    if starts:
        _check_alike(ranks.gather(sys.argv[1:]))
    return ranks


def _check_alike(every: list[list[str]]) -> None:
    """Raises UserError unless all processes were started with the same arguments: else one would train or count what another
    does not, or wait for it for ever."""
    for rank, given in enumerate(every):
        for at, (own, first) in enumerate(zip_longest(given, every[0])):
            if own != first:
                told, wanted = (" ".join(words[max(0, at - 1) : at + 1]) for words in (given, every[0]))
                raise UserError(
                    f"process {rank} was started with '{told}' where the first has '{wanted}': start all with the same arguments"
                )


@contextmanager
def running_ranks(device: str) -> Iterator[Ranks]:
    """`start_ranks`; the processes part at the end of the outermost such block.

    Raises UserError where another process has ended, by `kill -9` or an error of its own.
    """
    if dist.is_available() and dist.is_initialized():
        yield start_ranks(device)
        return
    ranks = start_ranks(device)
    try:
        yield ranks
    except RuntimeError as error:
        if ranks.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise UserError(
                f"another process of this run has ended or does not answer ({first_line(error)}): start all of them again "
                "with the same command, which goes on where this one was"
            ) from error
        raise
    if ranks.world > 1:  # after an error the process ends, and does not wait for the others
        ranks.wait()
        dist.destroy_process_group()


@contextmanager
def held_by_all(directory: Path, ranks: Ranks) -> Iterator[None]:
    """`holding` by the first process for all: the others go on when it has the lock."""
    with holding(directory) if ranks.is_first else nullcontext():
        ranks.wait()
        yield
        ranks.wait()


def is_first_to_fail() -> bool:
    """Whether this process of the run is the first that ends with an error: it alone says so, for the others' errors follow
    from it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # of torchrun, which starts all again if told so
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(place, timeout=5).close()  # torch's own attempt is slow to fail, and loud
        return (
            dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5)).add(f"puzzle/failed/{start}", 1) == 1
        )
    except (OSError, RuntimeError, KeyError, ValueError):  # the store is not up yet, or has gone with the first process
        return os.environ.get("RANK") == "0"
