"""Time one sub-block as it runs on a GPU: a chain of copies with weights and caches of their own, as one CUDA graph.

Copies follow each other as a model's layers do: the stream of one is the input of the next, and by the time a copy's turn
comes again its weights have left the cache (the L2 of an H100 holds 50 MB). A sample is one replay over the chain's length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from puzzle.blocklib.fast import Batch, Fast, FastAttention, Stream, make_fast
from puzzle.kernels.timer import Timing, percentiles

COLD_BYTES = 200 * 2**20  # weights and caches rotate through at least this much, four times the L2
MAX_COPIES = 24


def num_copies(weight_bytes: int, cache_bytes: int) -> int:
    """How many copies a chain needs to run on cold weights and caches."""
    return max(2, min(MAX_COPIES, -(-COLD_BYTES // max(1, weight_bytes + cache_bytes))))


def fast_copies(modules: Sequence[nn.Module], batch: Batch) -> list[Fast]:
    """The modules ready to run in `batch`; their caches hold noise."""
    found = [part for module in modules if (part := make_fast(module, batch)) is not None]
    for part in found:
        if isinstance(part, FastAttention):
            part.randomize()
    return found


def chain(parts: Sequence[Fast], batch: Batch, phase: str, delta: Tensor, residual: Tensor) -> Callable[[], Stream]:
    """One pass through all parts."""

    def run() -> Stream:
        stream: Stream = (delta, residual)
        for part in parts:
            stream = part.prefill(stream, batch) if phase == "prefill" else part.decode(stream, batch)
        return stream

    return run


def time_replays(
    replay: Callable[[], object],
    length: int,
    device: torch.device,
    seconds: float,
    min_samples: int,
    settle: float = 0.0,
) -> Timing:
    """Seconds of one link: replays until `seconds` have passed and there are `min_samples`, each divided by `length`.

    settle: seconds of replays before, after which clocks stand where sustained work brings them.
    """
    if device.type != "cuda":
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < min_samples or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            replay()
            samples.append((time.perf_counter() - start) / length)
        return percentiles(samples)
    replay()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    replay()
    last.record()
    last.synchronize()
    once = max(first.elapsed_time(last) / 1e3, 1e-6)
    for _ in range(int(settle / once)):
        replay()
    count = max(min_samples, min(400, int(seconds / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[-1].synchronize()
    return percentiles([a.elapsed_time(b) / 1e3 / length for a, b in pairwise(events)])
