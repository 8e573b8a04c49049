"""How far a child's next-token distribution is from its parent's.

Letters: S sequences, T tokens a sequence, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.base.ranks import Ranks
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
        """Residual streams before the final norm [S, T, H] each, in one dtype, and the ids [S, T] they come from. They may be of
        unequal widths."""
        head, own = model.head_weight, child.head_weight
        shared = own is head or (own.shape == head.shape and torch.equal(own, head))
        width = max(head.shape[1], own.shape[1])
        found = linear_kl(
            widened(model.final(parent_hidden).flatten(0, 1), width),
            widened(child.final(child_hidden).flatten(0, 1), width),
            widened(head, width),
            None if shared else widened(own, width),
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
        """kl_stderr takes sequences as the independent draws: tokens of one text are not. Of a single one it has no bound (inf)."""
        kl = torch.cat(self._kl)
        spread = kl.std(unbiased=True).item() if len(kl) > 1 else math.inf
        return {
            "kl": kl.mean().item(),
            "kl_stderr": spread / math.sqrt(len(kl)),
            "lm_loss": torch.cat(self._loss).mean().item(),
            "top1_agreement": torch.cat(self._same).mean().item(),
            "num_tokens": self.num_tokens,
        }

    def of_sequences(self) -> list[float]:
        """KL of each sequence, in their order: those of two children on the same text make pairs."""
        return torch.cat(self._kl).tolist() if self._kl else []


def widened(x: Tensor, width: int) -> Tensor:
    """Zeros to the right of x up to `width` columns; x itself when it has them."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


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
def compare(parent: CausalModel, child: CausalModel, sequences: Tensor, batch_size: int = 8) -> dict[str, Any]:
    """Divergence of a whole child from its parent on sequences [S, T], and "kl_of_sequences", of each; "parent_loss" is the parent's own
    LM loss."""
    return _result(*_whole(parent, child, sequences.split(batch_size)))


@torch.no_grad()
def compare_layered(
    parent: Layered, child: Layered, sequences: Tensor, plan: Residency, ranks: Ranks | None = None
) -> dict[str, Any]:
    """`compare`; streamed models read their weights once, while the streams of all sequences wait. ranks: the processes that take
    some of the batches each; None: this one."""
    batches = sequences.split(plan.batch_size)
    mine = batches if ranks is None else ranks.part(batches)
    if parent.model is not None and child.model is not None:
        meters = _whole(parent.model, child.model, mine)
    else:
        meters = _streamed(parent, child, [ids.long().to(parent.device) for ids in mine], plan)
    return _result(*meters) if ranks is None else _result(*(meter.joined(ranks) for meter in meters))


def _whole(parent: CausalModel, child: CausalModel, batches: Sequence[Tensor]) -> tuple[Divergence, Divergence]:
    """Of the child, and of the parent from itself."""
    meter, itself = Divergence(), Divergence()
    for ids in batches:
        ids = ids.long().to(parent.head_weight.device)
        hidden = parent.hidden(ids)
        itself.add(parent, hidden, parent, hidden, ids)
        meter.add(parent, hidden, child, child.hidden(ids), ids)
    return meter, itself


def _streamed(
    parent: Layered, child: Layered, batches: Sequence[Tensor], plan: Residency
) -> tuple[Divergence, Divergence]:
    meter, itself = Divergence(), Divergence()
    if not batches:  # more processes than batches
        return meter, itself
    room = Room(parent.device, plan.on_device)
    streams = [model.hidden(batches, room) for model in (parent, child)]
    last, own = parent.last(), child.last()
    fetched = room.fetched((stream, n) for n in range(len(batches)) for stream in streams)
    for ids in batches:
        hidden = next(fetched)
        itself.add(last, hidden, last, hidden, ids)
        meter.add(last, hidden, own, next(fetched), ids)
    return meter, itself


def _result(meter: Divergence, itself: Divergence) -> dict[str, Any]:
    return meter.result() | {"kl_of_sequences": meter.of_sequences(), "parent_loss": itself.result()["lm_loss"]}
