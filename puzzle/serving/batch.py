"""Prompts of many lengths at once: an engine's log-probabilities against the reference's in float32.

An engine in bf16 rounds in its own order, so that what is right is measured and not guessed: our plain forward in bf16 is compared
with the same reference, and the engine's mean |Δ log p| may be 1.2 times that one's. Where experts are chosen, few prompts make the mean
and other ones with every rounding: there the largest of several runs counts, each rounded otherwise (`roundings.py`). Words are compared after
each prompt (all of them) and while the engine continues it greedily, all prompts together (the likeliest of each step, over the engine's own text).
Letters: P prompts, N new tokens, K likeliest words, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from puzzle.runtime.model import CausalModel
from puzzle.serving.reference import Export
from puzzle.serving.roundings import round_to, rounded_otherwise

TIMES_PLAIN = 1.2
ROUNDINGS = 8  # runs of plain, where experts are chosen
LIKELIEST = 20
WORKSPACE = 8 * 2**30  # bytes of an engine's activations, CUDA graphs and context
SPARE = 2**30


class Size(NamedTuple):
    """lengths: of prompts, in tokens; more: how many others, of `up_to` tokens at most; new_tokens: that each is continued by."""

    lengths: tuple[int, ...]
    more: int
    up_to: int
    new_tokens: int


SIZES = {"gpu": Size((17, 40, 333, 1500, 2047, 3000), 26, 900, 24), "cpu": Size((17, 40, 100, 256), 4, 200, 16)}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """after, during: in float32 the largest |Δ log p| / std, else the mean |Δ log p|, after the prompts and while they are continued.

    plain_after, plain_during: the same of our plain forward in the engine's dtype, each the largest of `plain_runs` roundings; None, and 0
    runs, in float32. same_texts: how many continuations are the reference's greedy ones too."""

    dtype: str
    num_prompts: int
    shortest: int
    longest: int
    after: float
    during: float
    plain_after: float | None
    plain_during: float | None
    plain_runs: int
    tolerance: float
    same_texts: int

    @property
    def equal(self) -> bool:
        plain = ((self.after, self.plain_after), (self.during, self.plain_during))
        return all(found <= self.tolerance * (1.0 if usual is None else usual) < math.inf for found, usual in plain)

    @property
    def verdict(self) -> str:
        size = f"{self.num_prompts} prompts of {self.shortest} to {self.longest:,} tokens at once in {self.dtype}"
        texts = f"{self.same_texts} of {self.num_prompts} greedy texts the same"
        if self.plain_after is None or self.plain_during is None:
            return f"{size}: {self.after:.1e}, continuing {self.during:.1e}, {texts}"
        largest = f", the largest of {self.plain_runs} roundings" if self.plain_runs > 1 else ""
        return (
            f"{size}: mean |Δ log p| {self.after:.3g} (plain {self.dtype}: {self.plain_after:.3g}), continuing {self.during:.3g} "
            f"({self.plain_during:.3g}), at most {self.tolerance:g} times plain{largest}; {texts}"
        )


def plan_batches(export: Export) -> dict[str, dict[str, Any]]:
    """By device of the engine: random prompts (seed 0) within the export's length, and how far to continue them."""
    found = {}
    for device, size in SIZES.items():
        generator = torch.Generator().manual_seed(0)
        room = max(1, export.max_length - size.new_tokens)
        drawn = torch.randint(20, size.up_to, (size.more,), generator=generator).tolist()
        prompts = [
            torch.randint(0, export.vocab_size, (min(length, room),), generator=generator).tolist()
            for length in (*size.lengths, *drawn)
        ]
        top = min(LIKELIEST, export.vocab_size)
        found[device] = {"prompts": prompts, "num_tokens": size.new_tokens, "top": top}
    return found


def gpu_bytes(model: CausalModel, batch: dict[str, Any]) -> dict[str, int]:
    """What an engine in bf16 may take of a GPU for `batch` (one of `plan_batches`), since others may be at work there: `cache_bytes`, four
    times what is kept, since an engine pads layers to equal pages, and SPARE; `gpu_bytes`: these, weights and WORKSPACE."""
    tokens = sum(len(prompt) + batch["num_tokens"] for prompt in batch["prompts"])
    states = [part.sub_block.state() for _, _, part in model.parts()]
    per_token, fixed = sum(s.per_token for s in states), sum(s.fixed_bytes("bf16") for s in states)
    caches = 4 * (2 * per_token * tokens + fixed * len(batch["prompts"])) + SPARE
    weights = int(1.1 * model.weight_bytes * 2 / model.embedding.weight.element_size())
    return {"gpu_bytes": weights + caches + WORKSPACE, "cache_bytes": caches}


@torch.no_grad()
def log_probs(
    model: CausalModel, prompts: list[list[int]], texts: Tensor, words: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """After each prompt [P, V], of `words` [P, N, K] at each step along `texts` [P, N], and the likeliest word there [P, N]."""
    after, during, best = [], [], []
    for prompt, text, asked in zip(prompts, texts.tolist(), words, strict=True):
        ids = torch.tensor([prompt + text[:-1]], device=model.embedding.weight.device)
        rows = model.logits(model.hidden(ids)[0, len(prompt) - 1 :]).float().log_softmax(-1).cpu()
        after.append(rows[0])
        during.append(rows.gather(1, asked))
        best.append(rows.argmax(-1))
    return torch.stack(after), torch.stack(during), torch.stack(best)


def compare_batch(
    model: CausalModel, prompts: list[list[int]], found: dict[str, Any], tolerance: float, device: torch.device
) -> Batch:
    """model: the reference in float32, which is moved to `device` and rounded to the engine's dtype when float32 is done.
    found: as `worker.py` describes it; tolerance: of an engine in float32."""
    dtype = str(found["dtype"])
    texts, words = torch.from_numpy(found["texts"]), torch.from_numpy(found["words"])
    theirs = [torch.from_numpy(found[name]) for name in ("after", "during")]
    model = model.to(device)
    *ours, best = log_probs(model, prompts, texts, words)
    plain: list[tuple[float, float]] = []
    if dtype == "float32":
        std = ours[0].std(dim=-1).mean()
        after, during = (_finite((a - b).abs().max() / std) for a, b in zip(theirs, ours, strict=True))
    else:
        tolerance = TIMES_PLAIN
        after, during = _means(theirs, ours)
        plain = plain_means(round_to(model, getattr(torch, dtype)), prompts, texts, words, ours)
    lengths = [len(prompt) for prompt in prompts]
    return Batch(
        dtype=dtype,
        num_prompts=len(prompts),
        shortest=min(lengths),
        longest=max(lengths),
        after=after,
        during=during,
        plain_after=max((after for after, _ in plain), default=None),
        plain_during=max((during for _, during in plain), default=None),
        plain_runs=len(plain),
        tolerance=tolerance,
        same_texts=int((best == texts).all(dim=-1).sum()),
    )


def plain_means(
    model: CausalModel, prompts: list[list[int]], texts: Tensor, words: Tensor, ours: list[Tensor]
) -> list[tuple[float, float]]:
    """Mean |Δ log p| after and during, of `model` as it is and, where it chooses experts, rounded otherwise: ROUNDINGS runs.

    ours: of the reference. Without routing one run will do: 16 of two dense tiny children lay within 14 % of each other after prompts and 8 %
    while continuing, of three mixtures within 81 and 34 % (docs/lessons.md)."""
    found = [_means(log_probs(model, prompts, texts, words)[:2], ours)]
    if any(part.sub_block.routes for _, _, part in model.parts()):
        for seed in range(1, ROUNDINGS):
            with rounded_otherwise(model, seed):
                found.append(_means(log_probs(model, prompts, texts, words)[:2], ours))
    return found


def _means(found: Sequence[Tensor], ours: Sequence[Tensor]) -> tuple[float, float]:
    after, during = (_finite((a - b).abs().mean()) for a, b in zip(found, ours, strict=True))
    return after, during


def _finite(value: Tensor) -> float:
    """NaN is as wrong as can be."""
    return value.nan_to_num(nan=float("inf")).item()
