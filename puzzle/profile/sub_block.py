"""Time one sub-block as it runs inside a model: cold weights, whole replays, percentiles.

Copies of the sub-block (and of its cache) rotate, as a model's layers do, so that a weight is not found in a cache
that a real model would have flushed. Every sample is one call on the next copy.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from puzzle.blocklib.layer import LayerSpec, rope_tables
from puzzle.blocklib.runtime import decode, new_cache, prefill
from puzzle.kernels.timer import Timing, percentiles

Call = tuple[Callable[[], object], Callable[[], object]]

COLD_BYTES = 96 * 2**20  # weights rotate through at least this much: three times a large last-level cache


def rotating_copies(module: nn.Module, max_copies: int) -> list[nn.Module]:
    """`module` and as many copies as make COLD_BYTES of weights, at most `max_copies`."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    count = max(1, min(max_copies, -(-COLD_BYTES // size))) if size else 1
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def time_calls(calls: Sequence[Call], seconds: float, min_samples: int) -> Timing:
    """Walk round the list for `seconds` and at least `min_samples`; each call is one sample, the first round warms up.

    calls: (before, timed): `before` runs untimed, to leave the processor as a model's previous sub-block leaves it.
    """
    for before, call in calls[: max(2, min(len(calls), min_samples))]:
        before()
        call()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < min_samples or (time.perf_counter() - begin < seconds and len(samples) < 100 * min_samples):
        before, call = calls[len(samples) % len(calls)]
        before()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return percentiles(samples)


def bind(
    module: nn.Module, spec: LayerSpec, phase: str, batch: int, context: int, capacity: int, like: Tensor
) -> Callable[[], Tensor]:
    """One prefill of `context` tokens, or one decode step after `context` cached tokens, on data of its own.

    capacity: tokens that the cache is made for, above context; reading part of a large cache is slower than reading a
    small one whole (docs/lessons.md). like: a tensor of the dtype and device to run in.
    """
    cos, sin = rope_tables(spec, context + 1, like.device)
    cache = new_cache(module, batch, capacity, like)
    num_tokens = context if phase == "prefill" else 1
    x = torch.randn(batch, num_tokens, spec.hidden_size, device=like.device).to(like.dtype)
    if phase == "prefill":
        return lambda: prefill(module, x, (cos[:context], sin[:context]), cache)
    if cache is not None:
        cache.keys.normal_()
        cache.values.normal_()
    return lambda: decode(module, x, (cos[context:], sin[context:]), cache, context)


@torch.inference_mode()
def time_sub_block(
    copies: list[nn.Module],
    partners: list[nn.Module],
    spec: LayerSpec,
    *,
    phase: str,
    batch: int,
    context: int,
    capacity: int,
    like: Tensor,
    seconds: float,
    min_samples: int,
) -> Timing:
    """One sub-block's time, its residual add included, each call right after a sub-block of the other kind.

    partners: parent sub-blocks of the other kind, as a model would run before this one.
    """
    needed = len(copies)
    if phase == "prefill" and batch * context * spec.hidden_size > 2**22:
        needed = min(needed, 2)  # the activations alone flush every cache
    calls = [
        (
            bind(partners[i % len(partners)], spec, phase, batch, context, capacity, like),
            bind(copies[i], spec, phase, batch, context, capacity, like),
        )
        for i in range(needed)
    ]
    return time_calls(calls, seconds, min_samples)
