"""Time one sub-block as it runs inside a model: cold weights, whole replays, percentiles.

Copies of the sub-block (and of its cache) rotate, as a model's layers do, so that a weight is not found in a cache
that a real model would have flushed. Every sample is one call on the next copy.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puzzle.blocklib.layer import LayerSpec, rope_tables
from puzzle.blocklib.runtime import decode, new_cache, prefill

COLD_BYTES = 96 * 2**20  # weights rotate through at least this much: three times a large last-level cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one call: percentiles over num_samples calls."""

    p20: float
    p50: float
    p80: float
    num_samples: int


def percentiles(samples: list[float]) -> Timing:
    ordered = torch.tensor(samples, dtype=torch.float64)
    p20, p50, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(p20=p20, p50=p50, p80=p80, num_samples=len(samples))


def rotating_copies(module: nn.Module, max_copies: int) -> list[nn.Module]:
    """`module` and as many copies as make COLD_BYTES of weights, at most `max_copies`."""
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    count = max(1, min(max_copies, -(-COLD_BYTES // size))) if size else 1
    return [module, *(copy.deepcopy(module) for _ in range(count - 1))]


def time_calls(calls: list, seconds: float, min_samples: int) -> Timing:
    """Call round the list, one sample a call, for `seconds` and at least `min_samples`; the first round warms up."""
    for call in calls[: max(2, min(len(calls), min_samples))]:
        call()
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < min_samples or (time.perf_counter() - begin < seconds and len(samples) < 100 * min_samples):
        call = calls[len(samples) % len(calls)]
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return percentiles(samples)


@torch.inference_mode()
def time_sub_block(
    copies: list[nn.Module],
    spec: LayerSpec,
    *,
    phase: str,
    batch: int,
    context: int,
    like: Tensor,
    seconds: float,
    min_samples: int,
) -> Timing:
    """One sub-block's time, its residual add included.

    phase "prefill": a prompt of `context` tokens; "decode": one token with `context` tokens in the cache before it.
    like: a tensor of the dtype and device to run in.
    """
    hidden = spec.hidden_size
    cos, sin = rope_tables(spec, context + 1, like.device)
    calls = []
    for module in copies:
        cache = new_cache(module, batch, context + 1, like)
        if phase == "prefill":
            x = torch.randn(batch, context, hidden, device=like.device).to(like.dtype)
            rope = cos[:context], sin[:context]
            calls.append(lambda m=module, x=x, c=cache, r=rope: prefill(m, x, r, c))
        else:
            x = torch.randn(batch, 1, hidden, device=like.device).to(like.dtype)
            rope = cos[context:], sin[context:]
            if cache is not None:
                cache.keys.normal_()
                cache.values.normal_()
            calls.append(lambda m=module, x=x, c=cache, r=rope: decode(m, x, r, c, context))
        if phase == "prefill" and batch * context * hidden > 2**22 and len(calls) >= 2:
            break  # the activations alone flush every cache
    return time_calls(calls, seconds, min_samples)
