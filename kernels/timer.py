"""Times GPU work as a model meets it: operands not in the L2 cache, no launch overhead; and the device's own ceilings.

A caller gives several callables that do the same work on different copies of the operands. They are captured one after
another in one CUDA graph; by the time a copy's turn comes again, the others have pushed it out of the L2. A sample is one
replay's time, between two events, over the number of calls in the graph. Without a GPU: `time.perf_counter` around each
call, so that every caller also runs on a CPU (where the operands' place in the caches is not controlled).
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
L2_MULTIPLE = 4  # the copies together are this many times the L2
EVENT_BATCH = 16  # replays between two waits for the device
MIN_GRAPH_SECONDS = 4e-4  # shorter graphs are repeated: the resolution of an event is about half a microsecond


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


def capture(calls: Sequence[Call], rounds: int = 1) -> torch.cuda.CUDAGraph:
    """All calls in turn, `rounds` times, as one CUDA graph. Every call must have run before (compilation, handles).

    A call's result is kept until the same call comes again, so calls that allocate their outputs write to memory of
    their own.
    """
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = [None] * len(calls)
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for index, call in enumerate(calls):
                kept[index] = call()
    return graph


def time_calls(
    calls: Sequence[Call],
    *,
    seconds: float = 0.05,
    min_samples: int = 20,
    max_samples: int = 2000,
    device: torch.device | str | None = None,
) -> Timing:
    """Seconds per call. Samples until `seconds` of measured time and `min_samples` are there, or `max_samples`.

    device: where the calls run; by default the GPU if there is one. Raises ValueError without calls.
    """
    if not calls:
        raise ValueError("no calls to time")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return _time_on_cpu(calls, seconds, min_samples, max_samples)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # operands may still be in the making
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = capture(calls)
    graph.replay()
    once = _replay_seconds(graph, 2)[-1]
    rounds = min(64, max(1, round(MIN_GRAPH_SECONDS / max(once, 1e-7))))
    if rounds > 1:
        graph = capture(calls, rounds)
        graph.replay()
    samples: list[float] = []
    while len(samples) < max_samples and (len(samples) < min_samples or sum(samples) < seconds):
        samples += _replay_seconds(graph, EVENT_BATCH if once * rounds < 0.02 else 4)
    return percentiles([sample / (len(calls) * rounds) for sample in samples])


def _replay_seconds(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """`count` replays, queued ahead of the device so that none waits for the host."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
    for start, end in zip(marks[::2], marks[1::2], strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in zip(marks[::2], marks[1::2], strict=True)]


def _time_on_cpu(calls: Sequence[Call], seconds: float, min_samples: int, max_samples: int) -> Timing:
    for call in calls:
        call()
    samples: list[float] = []
    while len(samples) < max_samples and (len(samples) < min_samples or sum(samples) < seconds):
        start = time.perf_counter()
        calls[len(samples) % len(calls)]()
        samples.append(time.perf_counter() - start)
    return percentiles(samples)


def copy_bandwidth(device: torch.device | str = "cuda", num_bytes: int = 2**31, seconds: float = 0.1) -> float:
    """Bytes per second of a device-to-device copy of num_bytes, counting bytes read and bytes written."""
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_calls([lambda: target.copy_(source)], seconds=seconds, device=device).p50


def read_bandwidth(device: torch.device | str = "cuda", num_bytes: int = 2**32, seconds: float = 0.1) -> float:
    """Bytes per second of a float32 sum over num_bytes."""
    source = torch.randn(num_bytes // 4, device=device)
    return num_bytes / time_calls([lambda: source.sum()], seconds=seconds, device=device).p50


def matmul_rate(
    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cuda", size: int = 8192, seconds: float = 0.2
) -> float:
    """FLOP per second of a square product of random matrices; float8_e4m3fn goes through torch._scaled_mm."""
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        a, b = left.to(dtype), right.to(dtype).t()
        one = torch.ones((), device=device)

        def call() -> torch.Tensor:
            return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        a, b = left.to(dtype), right.to(dtype)

        def call() -> torch.Tensor:
            return a @ b

    return 2 * size**3 / time_calls([call], seconds=seconds, device=device).p50


def environment(device: torch.device | str | None = None) -> dict[str, str]:
    """What a row of measurements must carry: device, versions of torch, CUDA and triton, and the date (UTC)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": version,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
