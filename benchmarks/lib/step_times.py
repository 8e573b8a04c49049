"""Seconds of one decode step and of one prefill on our kernels: medians of replayed CUDA graphs (on a CPU, of plain calls)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from puzzle.kernels.timer import time_replays
from puzzle.runtime.fast import FastRuntime


def decode_step_seconds(runtime: FastRuntime, context: int, seconds: float = 0.1) -> float:
    """Of one step of every sequence after `context` cached tokens, which are noise."""
    runtime.randomize()
    runtime.at(context)
    return _median(runtime, runtime.step_again, seconds, min_samples=10)


def prefill_seconds(runtime: FastRuntime, length: int, seconds: float = 0.1) -> float:
    """Of the prompts of all sequences, `length` random tokens each."""
    prompts = torch.randint(0, runtime.vocab_size, (runtime.batch.size, length), device=runtime.device)
    return _median(runtime, lambda: runtime.prefill(prompts), seconds, min_samples=5)


def _median(runtime: FastRuntime, call: Callable[[], object], seconds: float, min_samples: int) -> float:
    return time_replays(runtime.replayed(call), 1, runtime.device, seconds, min_samples).p50
