"""Times of whole models on the fast runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch

from puzzle.base.workload import Workload
from puzzle.kernels.timer import Graph
from puzzle.runtime.fast import FastRunner, Stack


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A whole batch, measured: prompt to first token, time per later token, generated tokens over the wall time.

    memory_bytes: at the peak; on a CPU weights and caches only. workspace_bytes: of these, beside weights and caches.
    """

    batch: int
    tokens_per_second: float
    ttft_seconds: float
    tpot_seconds: float
    memory_bytes: int
    workspace_bytes: int


def serve(stack: Stack, batch: int, work: Workload, repeats: int = 3, fp8: bool = False) -> Served:
    """Generate for one batch of random prompts, `repeats` times after a warm-up; medians. Uses the stack up."""
    weight_bytes = stack.num_bytes
    runner = FastRunner(stack, batch, work.input_len + work.output_len, fp8, consume=True)
    held = 0
    if runner.device.type == "cuda":
        held = torch.cuda.memory_allocated(runner.device)
        torch.cuda.reset_peak_memory_stats(runner.device)
    prompts = torch.randint(0, len(stack.embedding), (batch, work.input_len), device=runner.device)
    runner.batch.at(work.input_len)
    with torch.inference_mode():
        first = Graph(lambda: runner.prefill(prompts), runner.device, warm_ups=1)
        step = Graph(runner._decode_and_advance, runner.device)
    times = []
    for _ in range(repeats):
        _wait(runner.device)
        begin = time.perf_counter()
        first.replay()
        _wait(runner.device)
        middle = time.perf_counter()
        for _ in range(work.output_len - 1):
            step.replay()
        _wait(runner.device)
        times.append((middle - begin, time.perf_counter() - middle))
    prefill, decode = (median(t[i] for t in times) for i in (0, 1))
    workspace = torch.cuda.max_memory_allocated(runner.device) - held if held else 0
    return Served(
        batch=batch,
        tokens_per_second=batch * work.output_len / (prefill + decode),
        ttft_seconds=prefill,
        tpot_seconds=decode / max(1, work.output_len - 1),
        memory_bytes=held + workspace if held else weight_bytes + runner.kv_bytes,
        workspace_bytes=workspace,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
