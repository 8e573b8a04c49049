"""How far a child's next-token distribution is from its parent's.

Letters: S sequences, T tokens a sequence, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.model import CausalModel

CHUNK_ELEMENTS = 2**26  # logits held at once, float32: 256 MiB a side


class Divergence:
    """Running mean of KL(parent‖child) in nats per token, LM loss, and top-1 agreement, over whole sequences."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []  # [S] mean over each sequence
        self._loss: list[Tensor] = []
        self._same: list[Tensor] = []
        self.num_tokens = 0

    def add(self, model: CausalModel, parent_hidden: Tensor, child: CausalModel, child_hidden: Tensor, ids: Tensor):
        """Residual streams before the final norm [S, T, H] each, and the ids [S, T] they come from."""
        num_sequences, length = ids.shape
        labels = torch.cat((ids[:, 1:], ids.new_full((num_sequences, 1), -100)), dim=1).to(parent_hidden.device)
        rows = max(1, CHUNK_ELEMENTS // model.head_weight.shape[0])
        parts = []
        flat = zip(
            parent_hidden.flatten(0, 1).split(rows),
            child_hidden.flatten(0, 1).split(rows),
            labels.flatten().split(rows),
            strict=True,
        )
        for from_parent, from_child, label in flat:
            log_p = F.log_softmax(model.logits(from_parent).float(), dim=-1)
            log_q = F.log_softmax(child.logits(from_child).float(), dim=-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
            loss = F.nll_loss(log_q, label, ignore_index=-100, reduction="none")
            parts.append(torch.stack((kl, loss, (log_p.argmax(-1) == log_q.argmax(-1)).float())))
        per_token = torch.cat(parts, dim=1).view(3, num_sequences, length).double()
        self._kl.append(per_token[0].mean(dim=1).cpu())
        self._loss.append(per_token[1].sum(dim=1).cpu() / (length - 1))
        self._same.append(per_token[2].mean(dim=1).cpu())
        self.num_tokens += num_sequences * length

    def result(self) -> dict[str, float]:
        """kl_stderr takes sequences as the independent draws: tokens of one text are not."""
        kl = torch.cat(self._kl)
        spread = kl.std(unbiased=True).item() if len(kl) > 1 else math.nan
        return {
            "kl": kl.mean().item(),
            "kl_stderr": spread / math.sqrt(len(kl)),
            "lm_loss": torch.cat(self._loss).mean().item(),
            "top1_agreement": torch.cat(self._same).mean().item(),
            "num_tokens": self.num_tokens,
        }


@torch.no_grad()
def compare(parent: CausalModel, child: CausalModel, sequences: Tensor, batch_size: int = 8) -> dict[str, float]:
    """Divergence of a whole child from its parent on sequences [S, T]."""
    meter = Divergence()
    for ids in sequences.split(batch_size):
        ids = ids.long().to(parent.head_weight.device)
        meter.add(parent, parent.hidden(ids), child, child.hidden(ids), ids)
    return meter.result()
