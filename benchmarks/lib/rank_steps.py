"""Replays of one step on all ranks, and what a row of a CSV says of them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from puzzle.base.device import short_name
from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks
from puzzle.runtime.parallel import nccl_words


@contextmanager
def ending_all() -> Iterator[None]:
    """Whatever fails in one rank ends its process at once, and so torchrun all others: a broken communicator would wait for them."""
    try:
        yield
    except Exception as error:  # out of memory, NCCL, a kernel that does not compile, a shape that cannot be divided
        if not isinstance(error, UserError):
            traceback.print_exc()
        said = " ".join(str(error).split())[:400]
        print(f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {said}", file=sys.stderr, flush=True)
        os._exit(1)


def percentiles(replay: Callable[[], object], steps: int, device: torch.device, ranks: Ranks | None) -> list[float]:
    """p20, p50, p80 seconds of one replay, of the slowest rank. The count is fixed, so that ranks stay in step."""
    for _ in range(5):
        replay()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize(device)
        events[0].record()
        for event in events[1:]:
            replay()
            event.record()
        torch.cuda.synchronize(device)
        samples = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    else:
        samples = []
        for _ in range(steps):
            begin = time.perf_counter()
            replay()
            samples.append(time.perf_counter() - begin)
    found = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return found.tolist() if ranks is None else ranks.slowest(found.tolist())


def versions_of(device: torch.device, tp: int) -> str:
    found = f"torch {torch.__version__}"
    if device.type == "cuda":
        import triton

        found += f"; triton {triton.__version__}" + (nccl_words(device) if tp > 1 else "")
    return found


def timed(found: Sequence[float], device: torch.device, tp: int) -> dict[str, str]:
    """The columns of `percentiles`, and on what and when they were measured."""
    columns = dict(zip(("p20_s", "p50_s", "p80_s"), (f"{seconds:.6g}" for seconds in found), strict=True))
    return columns | {
        "device": short_name(device),
        "versions": versions_of(device, tp),
        "date": time.strftime("%Y-%m-%d"),
    }
