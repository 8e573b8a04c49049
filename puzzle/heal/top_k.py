"""Top-K distillation: of a teacher's next-token distributions its K likeliest words are kept, and how much all others have together.

    KL(p‖q) over K + 1 outcomes = Σ_{v in top K} p_v (log p_v - log q_v) + r (log r - log s),   r = 1 - Σ p_v,  s = 1 - Σ q_v

It is at most the KL over all words, and the same where the child shares the others out as its teacher does. Letters: R tokens, K words
kept, V vocabulary, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from puzzle.kernels.linear_kl import IGNORE

MOST_LOGITS = 2**24  # in float32 at once


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """words [R, K] int64 and their log-probabilities [R, K], likeliest first; rest [R]: log of what all other words have."""

    words: Tensor
    logs: Tensor
    rest: Tensor


def top_k_of(normed: Tensor, head: Tensor, top_k: int, temperature: float) -> TopK:
    """Of softmax(normed · headᵀ / temperature), log-probabilities in nats. normed [R, H], head [V, H] with V > top_k"""
    wide, parts = head.to(torch.promote_types(head.dtype, torch.float32)), []
    for some in normed.split(max(1, MOST_LOGITS // len(head))):
        logs = F.log_softmax(some.to(wide.dtype) @ wide.T / temperature, -1)
        top, words = logs.topk(top_k)
        parts.append((words, top, logs.scatter(-1, words, -torch.inf).logsumexp(-1)))
    words, top, rest = (torch.cat(every) for every in zip(*parts, strict=True))
    return TopK(words=words, logs=top, rest=rest)


def top_k_losses(
    told: TopK, child: Tensor, head: Tensor, labels: Tensor, temperature: float, reverse: float
) -> tuple[Tensor, Tensor]:
    """KL over K + 1 outcomes at `temperature`, with the share `reverse` of it the other way round, and the LM loss, per row.

    child [R, H]: normed hidden states; head [V, H]. In chunks of rows that are computed again in the backward pass.
    """
    with torch.autocast(child.device.type, enabled=False):
        rows, head = max(1, MOST_LOGITS // len(head)), head.to(torch.promote_types(child.dtype, torch.float32))
        return in_chunks(_losses, (told.words, told.logs, told.rest, child, labels), rows, head, temperature, reverse)


def in_chunks(losses: Callable[..., Any], by_row: Sequence[Tensor], rows: int, *shared: Any) -> tuple[Tensor, Tensor]:
    """KL and LM loss of every token, [R] each, from `losses(*by_row, *shared)` of so many rows at once, computed again in the backward pass."""
    parts = [
        checkpoint(losses, *some, *shared, use_reentrant=False, preserve_rng_state=False)
        for some in zip(*(x.split(rows) for x in by_row), strict=True)
    ]
    kl, loss = zip(*parts, strict=True)
    return torch.cat(kl), torch.cat(loss)


def kl_of(p: Tensor, q: Tensor, reverse: float) -> Tensor:
    """KL(p‖q), with the share `reverse` of it the other way round, of log-probabilities [R, K] -> [R], in nats."""
    return (1 - reverse) * (p.exp() * (p - q)).sum(-1) + reverse * (q.exp() * (q - p)).sum(-1)


def _losses(
    words: Tensor, logs: Tensor, rest: Tensor, child: Tensor, labels: Tensor, head: Tensor, tau: float, reverse: float
) -> tuple[Tensor, Tensor]:
    logits = child.to(head.dtype) @ head.T
    own = F.log_softmax(logits / tau, -1)
    q = torch.cat((own.gather(-1, words), own.scatter(-1, words, -torch.inf).logsumexp(-1, keepdim=True)), -1)
    p = torch.cat((logs, rest[:, None]), -1).to(head.dtype)
    return kl_of(p, q, reverse), F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
