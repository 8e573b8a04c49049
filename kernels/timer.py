"""Times GPU work as a model meets it: operands not in the L2 cache, no launch overhead.

A caller gives several callables that do the same work on different copies of the operands. They are captured one after
another in one CUDA graph; by the time a copy's turn comes again, the others have pushed it out of the L2. A sample is the
time between two events, one replay apart, over the number of calls in the graph. Without a GPU: `time.perf_counter` around each
call, so that every caller also runs on a CPU (where the operands' place in the caches is not controlled).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from puzzle.base.device import side_stream

Call = Callable[[], Any]
L2_MULTIPLE = 4  # the copies together are this many times the L2
MAX_SAMPLES = 400
# Shorter graphs hold their calls several times: chains of 1 ms came out up to 6 µs a sub-block longer than of 4 ms on one machine (docs/lessons.md).
MIN_GRAPH_SECONDS, MAX_ROUNDS = 4e-3, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds per call at the 20th, 50th and 80th percentile of `num_samples` samples."""

    p20: float
    p50: float
    p80: float
    num_samples: int


def percentiles(samples: Sequence[float]) -> Timing:
    """Raises ValueError when there are no samples."""
    if not samples:
        raise ValueError("no samples to summarise")
    if len(samples) == 1:
        return Timing(p20=samples[0], p50=samples[0], p80=samples[0], num_samples=1)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(p20=cuts[1], p50=cuts[4], p80=cuts[7], num_samples=len(samples))


def l2_bytes(device: torch.device | str | int = "cuda") -> int:
    """Size of the device's L2 cache; 0 for a CPU."""
    device = torch.device(device)
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def num_copies(bytes_per_call: int, device: torch.device | str = "cuda", limit: int = 4096) -> int:
    """Copies of a call's operands that make every call find a cold L2: at least 2, at most `limit`; 1 on a CPU."""
    cache = l2_bytes(device)
    return 1 if cache == 0 else min(limit, max(2, -(-L2_MULTIPLE * cache // max(1, bytes_per_call)) + 1))


class Graph:
    """A call, captured `rounds` times in turn on a GPU and replayed as one CUDA graph; on a CPU simply called.

    The call may not wait for the device. warm_ups: calls before the capture, which compile kernels and open handles.
    """

    def __init__(self, call: Call, device: torch.device, warm_ups: int = 2, rounds: int = 1):
        self.call, self.rounds, self.graph = call, rounds, None
        if device.type == "cuda":
            side = side_stream(device)
            side.wait_stream(torch.cuda.current_stream(device))  # operands may still be in the making
            with torch.cuda.stream(side):
                for _ in range(warm_ups):
                    call()
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # NCCL's watchdog, another thread, may query events meanwhile
            mode = "thread_local" if dist.is_available() and dist.is_initialized() else "global"
            with torch.cuda.graph(self.graph, stream=side, capture_error_mode=mode):
                self._calls()

    def _calls(self) -> None:
        for _ in range(self.rounds):
            self.call()

    def replay(self) -> None:
        self.graph.replay() if self.graph is not None else self._calls()


def time_replays(
    replay: Call, length: int, device: torch.device, seconds: float, min_samples: int, settle: float = 0.0
) -> Timing:
    """Seconds of one of the `length` calls that a replay makes. Replays are queued ahead of the device, so that none waits
    for the host, until they take `seconds` and there are `min_samples` of them, MAX_SAMPLES at most.

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
    once = _between_events(replay, 1)[0]
    for _ in range(int(settle / once)):
        replay()
    count = max(min_samples, min(MAX_SAMPLES, int(seconds / once)))
    return percentiles([sample / length for sample in _between_events(replay, count)])


def _between_events(replay: Call, count: int) -> list[float]:
    """Seconds of each of `count` replays in a row."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    events[-1].synchronize()
    return [max(a.elapsed_time(b) * 1e-3, 1e-7) for a, b in pairwise(events)]


def rounds_for(once: float) -> int:
    """How often calls that take `once` seconds together go into a graph, so that its launch does not count."""
    return max(1, min(MAX_ROUNDS, math.ceil(MIN_GRAPH_SECONDS / max(once, 1e-7))))


def long_enough(call: Call, device: torch.device, graph: Graph) -> Graph:
    """A graph of `call` that takes MIN_GRAPH_SECONDS, or nearly, or holds it MAX_ROUNDS times: captured again where most of a short one's
    time was its launch. On a CPU `graph` as it is."""
    while device.type == "cuda" and graph.rounds < MAX_ROUNDS:
        took = time_replays(graph.replay, 1, device, 0.0, 1).p50
        if took > 0.9 * MIN_GRAPH_SECONDS:
            break
        graph = Graph(call, device, warm_ups=0, rounds=min(MAX_ROUNDS, graph.rounds * rounds_for(took)))
    return graph


def time_calls(
    calls: Sequence[Call],
    *,
    seconds: float = 0.05,
    min_samples: int = 20,
    device: torch.device | str | None = None,
) -> Timing:
    """Seconds per call. Samples until `seconds` of measured time and `min_samples` are there, MAX_SAMPLES at most.

    A call's result is kept until the same call comes again, so calls that allocate their outputs write to memory of
    their own. device: where the calls run; by default the GPU if there is one. Raises ValueError without calls.
    """
    if not calls:
        raise ValueError("no calls to time")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return _time_on_cpu(calls, seconds, min_samples)
    kept: list[Any] = [None] * len(calls)

    def run() -> None:
        for index, call in enumerate(calls):
            kept[index] = call()

    graph = long_enough(run, device, Graph(run, device, warm_ups=1))
    return time_replays(graph.replay, len(calls) * graph.rounds, device, seconds, min_samples)


def _time_on_cpu(calls: Sequence[Call], seconds: float, min_samples: int) -> Timing:
    for call in calls:
        call()
    samples: list[float] = []
    while len(samples) < MAX_SAMPLES and (len(samples) < min_samples or sum(samples) < seconds):
        start = time.perf_counter()
        calls[len(samples) % len(calls)]()
        samples.append(time.perf_counter() - start)
    return percentiles(samples)
