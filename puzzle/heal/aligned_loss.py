"""The KL of two models with other vocabularies, compared over the words that both know and, together, all that only one of them knows:

    kl = Σ_{v in both} p_v log(p_v / q_v) + r log(r / s),   r = 1 - Σ p_v,  s = 1 - Σ q_v

Where one of them knows no other word there is no r: both are taken among the common words alone. Letters: R tokens, C common words, V and
V' the child's and the teacher's vocabulary, H and H' their hidden sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.heal.top_k import MOST_LOGITS, in_chunks, kl_of
from puzzle.kernels.linear_kl import IGNORE


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """What a teacher with other words shows of R tokens. normed [R, H']: its last hidden states where it has come as far; there [R]: whether
    it has, and the same token follows in both; head [V', H']; words [2, C]: the child's and the teacher's ids of what both know."""

    normed: Tensor
    there: Tensor
    head: Tensor
    words: Tensor


def aligned_losses(
    shown: Aligned, child: Tensor, head: Tensor, labels: Tensor, temperature: float, reverse: float
) -> tuple[Tensor, Tensor]:
    """KL at `temperature`, with the share `reverse` of it the other way round, of tokens that are `there`, 0 elsewhere; and the LM loss. [R]

    child [R, H]: normed hidden states; head [V, H]. In chunks of rows that are computed again in the backward pass.
    """
    with torch.autocast(child.device.type, enabled=False):
        wide = torch.promote_types(child.dtype, torch.float32)
        heads, rows = (head.to(wide), shown.head.to(wide)), max(1, MOST_LOGITS // max(len(head), len(shown.head)))
        rest = all(len(one) > shown.words.shape[1] for one in heads)
        by_row, more = (child, shown.normed, labels), (*heads, shown.words, rest, temperature, reverse)
        kl, loss = in_chunks(_losses, by_row, rows, *more)
        return torch.where(shown.there, kl, 0), loss


def _losses(
    child: Tensor, teacher: Tensor, labels: Tensor, head: Tensor, other: Tensor, words: Tensor, rest: bool, tau: float, reverse: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits = child.to(head.dtype) @ head.T
    q, p = _outcomes(logits / tau, words[0], rest), _outcomes(teacher.to(other.dtype) @ other.T / tau, words[1], rest)
    return kl_of(p, q, reverse), F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")


def _outcomes(logits: Tensor, words: Tensor, rest: bool) -> Tensor:
    """Log-probabilities of `words` and, with `rest`, of all others together. [R, V] -> [R, C] or [R, C + 1]"""
    if not rest:
        return F.log_softmax(logits[:, words], -1)
    logs = F.log_softmax(logits, -1)
    return torch.cat((logs[:, words], logs.index_fill(-1, words, -torch.inf).logsumexp(-1, keepdim=True)), -1)
