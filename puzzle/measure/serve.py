"""The one yardstick: a whole batch of requests, from prompts to last tokens, on the runtime that was priced."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from puzzle.base.device import wait_for
from puzzle.base.workload import Workload
from puzzle.runtime.interface import Runtime

STEADY = 0.02  # two timings in a row that differ by less need no third


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A batch, measured; medians over repeats. tokens_per_second: generated tokens over prefill and decode together; ttft: prompts
    to first tokens; tpot: per later token. memory_bytes: at the peak; on a CPU weights and states only. workspace_bytes: of these,
    beside weights and states."""

    batch: int
    tokens_per_second: float
    ttft_seconds: float
    tpot_seconds: float
    decode_seconds: float
    memory_bytes: int
    workspace_bytes: int


class _Serving:
    """One runtime with its prompts, ready to be timed again and again."""

    def __init__(self, make: Callable[[], Runtime], work: Workload):
        before = _allocated()  # what others hold, who are no part of this
        self.runtime = runtime = make()
        self.work, self.before, self.held = work, before, 0
        if runtime.device.type == "cuda":
            self.held = _allocated() - before
            torch.cuda.reset_peak_memory_stats(runtime.device)
        generator = torch.Generator().manual_seed(0)
        size = (len(runtime.ids), work.input_len)
        self.prompts = torch.randint(0, runtime.vocab_size, size, generator=generator).to(runtime.device)
        runtime.at(work.input_len)
        self.first = runtime.replayed(lambda: runtime.prefill(self.prompts), warm_ups=1)
        self.step = runtime.replayed(runtime.step)

    def warm_up(self) -> None:
        self.first()
        self.step()

    def once(self) -> tuple[float, float]:
        """Seconds of the prefill and of all decode steps."""
        wait_for(self.runtime.device)
        begin = time.perf_counter()
        self.first()
        wait_for(self.runtime.device)
        middle = time.perf_counter()
        for _ in range(self.work.output_len - 1):
            self.step()
        wait_for(self.runtime.device)
        return self.runtime.agreed(middle - begin, time.perf_counter() - middle)

    def result(self, times: list[tuple[float, float]]) -> Served:
        runtime, work, batch = self.runtime, self.work, len(self.runtime.ids)
        prefill, decode = (median(t[i] for t in times) for i in (0, 1))
        workspace = torch.cuda.max_memory_allocated(runtime.device) - self.before - self.held if self.held else 0
        return Served(
            batch=batch,
            tokens_per_second=batch * work.output_len / median(a + b for a, b in times),
            ttft_seconds=prefill,
            tpot_seconds=decode / max(1, work.output_len - 1),
            decode_seconds=decode,
            memory_bytes=self.held + workspace if self.held else runtime.weight_bytes + runtime.state_bytes,
            workspace_bytes=workspace,
        )


def _allocated() -> int:
    """Bytes of the GPU that tensors hold; 0 without one. What only circles of references hold, as graphs' calls do, goes first."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def serve(runtimes: Mapping[str, Callable[[], Runtime]], work: Workload, repeats: int = 3) -> dict[str, Served]:
    """Time every runtime on one workload, `repeats` times or until it is steady. On a CPU they take turns, after one that warms up, so that a slow minute falls on all
    alike; on a GPU one is made when the one before has gone, so that each has the card's memory to itself."""
    makers = dict(runtimes)
    found: dict[str, Served] = {}
    while makers:
        names = list(makers)
        together = {names[0]: _Serving(makers.pop(names[0]), work)}
        if next(iter(together.values())).runtime.device.type != "cuda":
            together |= {name: _Serving(makers.pop(name), work) for name in names[1:]}
            for serving in together.values():
                serving.warm_up()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in together}
        for _ in range(repeats):
            for name, serving in together.items():
                times[name].append(serving.once())
            if all(_steady([sum(once) for once in each]) for each in times.values()):
                break
        found |= {name: serving.result(times[name]) for name, serving in together.items()}
        del together, serving
        _allocated()
    return found


def _steady(seconds: list[float]) -> bool:
    """Whether the last two agree."""
    return len(seconds) > 1 and abs(seconds[-1] / seconds[-2] - 1) < STEADY
