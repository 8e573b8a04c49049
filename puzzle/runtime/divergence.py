"""How far a child's next-token distribution is from its parent's.

Letters: S sequences, T tokens a sequence, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from puzzle.base.ranks import Ranks
from puzzle.kernels.linear_kl import IGNORE, Chunks, linear_kl
from puzzle.runtime.model import CausalModel


class Divergence:
    """Running mean of KL(parent‖child) in nats per token, LM loss, and top-1 agreement, over whole sequences."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []  # [S] mean over each sequence
        self._loss: list[Tensor] = []
        self._same: list[Tensor] = []
        self.num_tokens = 0

    @torch.no_grad()
    def add(
        self, model: CausalModel, parent_hidden: Tensor, child: CausalModel, child_hidden: Tensor, ids: Tensor
    ) -> None:
        """Residual streams before the final norm [S, T, H] each, in one dtype, and the ids [S, T] they come from."""
        num_sequences, length = ids.shape
        labels = torch.cat((ids[:, 1:], ids.new_full((num_sequences, 1), IGNORE)), dim=1).to(parent_hidden.device)
        head, own = model.head_weight, child.head_weight
        shared = own is head or (own.shape == head.shape and torch.equal(own, head))
        found = linear_kl(
            model.final(parent_hidden).flatten(0, 1),
            child.final(child_hidden).flatten(0, 1),
            head,
            None if shared else own,
            labels.flatten(),
            config=Chunks(logits=torch.float32),
        )
        assert found.lm_loss is not None
        kl, loss, same = (x.view(num_sequences, length).double() for x in (found.kl, found.lm_loss, found.same_top1))
        self._kl.append(kl.mean(dim=1).cpu())
        self._loss.append(loss.sum(dim=1).cpu() / (length - 1))
        self._same.append(same.mean(dim=1).cpu())
        self.num_tokens += num_sequences * length

    def joined(self, ranks: Ranks) -> Divergence:
        """Of all processes' sequences, by rank."""
        every, whole = ranks.gather(self), Divergence()
        for one in every:
            whole._kl += one._kl
            whole._loss += one._loss
            whole._same += one._same
            whole.num_tokens += one.num_tokens
        return whole

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
def compare(
    parent: CausalModel, child: CausalModel, sequences: Tensor, batch_size: int = 8, ranks: Ranks | None = None
) -> dict[str, float]:
    """Divergence of a whole child from its parent on sequences [S, T]; "parent_loss" is the parent's own LM loss. ranks: the
    processes that take some of the batches each; None: this one."""
    meter, itself = Divergence(), Divergence()
    batches = sequences.split(batch_size)
    for ids in batches if ranks is None else ranks.part(batches):
        ids = ids.long().to(parent.head_weight.device)
        hidden = parent.hidden(ids)
        itself.add(parent, hidden, parent, hidden, ids)
        meter.add(parent, hidden, child, child.hidden(ids), ids)
    if ranks is not None:
        meter, itself = meter.joined(ranks), itself.joined(ranks)
    return meter.result() | {"parent_loss": itself.result()["lm_loss"]}
