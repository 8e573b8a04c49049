"""How far a child's next-token distribution is from its parent's.

Letters: S sequences, T tokens a sequence, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from puzzle.kernels.linear_kl import IGNORE, Chunks, LinearKL, linear_kl, linear_kl_of_many
from puzzle.runtime.model import CausalModel
from puzzle.runtime.residency import Residency
from puzzle.runtime.stream import Layered, Room

LOGITS = Chunks(logits=torch.float32)


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
        head, own = model.head_weight, child.head_weight
        shared = own is head or (own.shape == head.shape and torch.equal(own, head))
        found = linear_kl(
            model.final(parent_hidden).flatten(0, 1),
            child.final(child_hidden).flatten(0, 1),
            head,
            None if shared else own,
            labels_of(ids, parent_hidden.device),
            config=LOGITS,
        )
        self._note(found, *ids.shape)

    def _note(self, found: LinearKL, num_sequences: int, length: int) -> None:
        assert found.lm_loss is not None
        kl, loss, same = (x.view(num_sequences, length).double() for x in (found.kl, found.lm_loss, found.same_top1))
        self._kl.append(kl.mean(dim=1).cpu())
        self._loss.append(loss.sum(dim=1).cpu() / (length - 1))
        self._same.append(same.mean(dim=1).cpu())
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


def labels_of(ids: Tensor, device: torch.device) -> Tensor:
    """The next token of every one; none of the last. ids [S, T] -> [S · T]"""
    return torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), IGNORE)), dim=1).to(device).flatten()


@torch.no_grad()
def add_variants(
    meters: Sequence[Divergence], model: CausalModel, parent_hidden: Tensor, hidden: Sequence[Tensor], ids: Tensor
) -> None:
    """`Divergence.add` of several models with the parent's final norm and head, whose logits are computed once."""
    normed = [model.final(one).flatten(0, 1) for one in hidden]
    labels, parent = labels_of(ids, parent_hidden.device), model.final(parent_hidden).flatten(0, 1)
    for meter, found in zip(
        meters, linear_kl_of_many(parent, normed, model.head_weight, labels, config=LOGITS), strict=True
    ):
        meter._note(found, *ids.shape)


@torch.no_grad()
def compare(parent: CausalModel, child: CausalModel, sequences: Tensor, batch_size: int = 8) -> dict[str, float]:
    """Divergence of a whole child from its parent on sequences [S, T]; "parent_loss" is the parent's own LM loss."""
    meter, itself = Divergence(), Divergence()
    for ids in sequences.split(batch_size):
        ids = ids.long().to(parent.head_weight.device)
        hidden = parent.hidden(ids)
        itself.add(parent, hidden, parent, hidden, ids)
        meter.add(parent, hidden, child, child.hidden(ids), ids)
    return meter.result() | {"parent_loss": itself.result()["lm_loss"]}


@torch.no_grad()
def compare_layered(parent: Layered, child: Layered, sequences: Tensor, plan: Residency) -> dict[str, float]:
    """`compare`; streamed models read their weights once, while the streams of all sequences wait."""
    if parent.model is not None and child.model is not None:
        return compare(parent.model, child.model, sequences, plan.batch_size)
    batches = [ids.long().to(parent.device) for ids in sequences.split(plan.batch_size)]
    room = Room(parent.device, plan.on_device)
    streams = [model.hidden(batches, room) for model in (parent, child)]
    meter, itself, last, own = Divergence(), Divergence(), parent.last(), child.last()
    fetched = room.fetched((stream, n) for n in range(len(batches)) for stream in streams)
    for ids in batches:
        hidden = next(fetched)
        itself.add(last, hidden, last, hidden, ids)
        meter.add(last, hidden, own, next(fetched), ids)
    return meter.result() | {"parent_loss": itself.result()["lm_loss"]}
