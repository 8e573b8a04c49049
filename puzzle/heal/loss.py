"""Global knowledge distillation: KL of the next-token distributions and cosine of the hidden states, without logits.

    L = w_kl · τ² · mean_t KL(softmax(z_p/τ) ‖ softmax(z_c/τ))     (a share of it the other way round: `reverse`)
      + w_cos · mean_{t, pairs} (1 - cos(h_c, h_p))
      + w_lm · mean_t -log softmax(z_c)[next token]

A teacher with another tokenizer is compared at some tokens only (`common.py`); at the others w_kl weighs the LM loss.

Sources: Puzzle (arXiv 2411.19146, section on global knowledge distillation: KL and cosine together, no LM loss, heal best) and
Llama-Nemotron (arXiv 2505.00949); the factor τ² keeps gradients of one size (Hinton et al., arXiv 1503.02531). Means are
over the tokens whose label counts, of the whole step. h: the residual stream after a layer, in pairs of child and teacher.

Letters: B batch, T tokens, H hidden_size, V vocab_size, R = B·T rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from puzzle.blocklib.plain.part import Ropes
from puzzle.data.mixture import IGNORE
from puzzle.heal.aligned_loss import Aligned, aligned_losses
from puzzle.heal.top_k import TopK, top_k_losses
from puzzle.kernels.cosine import cosine_distance
from puzzle.kernels.linear_kl import Chunks, linear_kl, linear_kl_by_rows
from puzzle.runtime.divergence import widened
from puzzle.runtime.model import CausalModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Of the three losses, and of the first the temperature τ and the share that is KL(child‖teacher)."""

    kl: float = 1.0
    cosine: float = 1.0
    lm: float = 0.0
    temperature: float = 1.0
    reverse: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What the teacher shows: its hidden states [B, T, H] after the layers asked for, and the normed last one [R, H]."""

    hidden: list[Tensor]
    normed: Tensor

    def to(self, device: torch.device) -> Shown:
        return Shown(hidden=[h.to(device) for h in self.hidden], normed=self.normed.to(device))


Seen = Shown | TopK | Aligned | None


class Teacher(nn.Module):
    """A frozen model that shows hidden states. layers: after which ones."""

    def __init__(self, model: CausalModel, layers: list[int]):
        super().__init__()
        self.model, self.layers = model.requires_grad_(False), frozenset(layers)

    def forward(self, ids: Tensor, ropes: Ropes, keep: bool = True) -> Shown:
        """keep: whether hidden states are wanted, not the last one alone. ids [B, T]"""
        x = self.model.embed(ids)
        hidden = []
        for index, block in enumerate(self.model.blocks):
            x = block(x, ropes)
            if keep and index in self.layers:
                hidden.append(x)
        return Shown(hidden=hidden, normed=self.model.final(x).flatten(0, 1))


class Learner(nn.Module):
    """The child with its loss. pairs: (child layer, teacher layer) that should agree, in order.

    teacher_head: [V, H] of the teacher; None when it is the child's own. dtype: of the residual stream. train_head: whether
    the head learns too.
    recompute: keep only what enters each block and compute the rest again in the backward pass.
    """

    def __init__(
        self,
        child: CausalModel,
        pairs: list[tuple[int, int]],
        teacher_head: Tensor | None,
        dtype: torch.dtype,
        *,
        train_head: bool = False,
        recompute: bool = False,
    ):
        super().__init__()
        self.child, self.teacher_head, self.dtype, self.train_head = child, teacher_head, dtype, train_head
        self.layers = [layer for layer, _ in pairs]
        if recompute:  # inside the block's forward, so that the shards of its weights are gathered around it
            for block in child.blocks:
                block.forward = partial(  # type: ignore[method-assign]
                    checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
                )

    def forward(
        self, ids: Tensor, labels: Tensor, ropes: Ropes, shown: Seen, scale: Tensor, weights: Weights
    ) -> Tensor:
        """Loss, KL, cosine distance, LM loss [5]: sums over the tokens that count, times `scale`; and of how many the KL is, likewise. ids,
        labels [B, T]"""
        counts = labels.flatten() != IGNORE
        x = self.child.embed(ids).to(self.dtype)
        distance = scale.new_zeros(())
        seen = 0
        for index, block in enumerate(self.child.blocks):
            x = block(x, ropes)
            if weights.cosine and isinstance(shown, Shown) and seen < len(self.layers) and self.layers[seen] == index:
                distance = distance + (cosine_distance(x, shown.hidden[seen]).flatten() * counts).sum()
                seen += 1
        distance = distance * scale / max(1, len(self.layers))
        kl = lm = elsewhere = scale.new_zeros(())
        if weights.kl or weights.lm:
            normed = self.child.final(x).flatten(0, 1)
            kl, lm, elsewhere = self._head(normed, shown, labels.flatten(), counts, scale, weights)
        total = weights.kl * (weights.temperature**2 * kl + elsewhere) + weights.cosine * distance + weights.lm * lm
        compared = (counts & shown.there if isinstance(shown, Aligned) else counts).sum() * scale
        return torch.stack((total, *(part.detach() for part in (kl, distance, lm, compared))))

    def _head(
        self, normed: Tensor, shown: Seen, labels: Tensor, counts: Tensor, scale: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor]:
        """KL, LM loss, and the LM loss of tokens at which a teacher is not compared: sums times `scale`."""
        head, none = self.child.head_weight, scale.new_zeros(())
        own = head if self.train_head else head.detach()
        if isinstance(shown, TopK):
            found, loss = top_k_losses(shown, normed, own, labels, weights.temperature, weights.reverse)
            return (found * counts).sum() * scale, (loss * counts).sum() * scale, none
        if isinstance(shown, Aligned):
            found, loss = aligned_losses(shown, normed, own, labels, weights.temperature, weights.reverse)
            found, loss, elsewhere = (one * counts for one in (found, loss, loss * ~shown.there))
            return found.sum() * scale, loss.sum() * scale, elsewhere.sum() * scale
        from_teacher = normed.detach() if shown is None else shown.normed
        teacher_head = head.detach() if shown is None or self.teacher_head is None else self.teacher_head
        child_head = None if self.teacher_head is None and not self.train_head else head
        kl = lm = none
        if weights.kl:
            found, loss = head_losses(
                from_teacher, normed, teacher_head, child_head, labels, weights.temperature, weights.reverse
            )
            kl = (found * counts).sum() * scale
            lm = (loss * counts).sum() * scale if weights.temperature == 1 else lm
        if weights.lm and (not weights.kl or weights.temperature != 1):
            _, loss = head_losses(from_teacher, normed, teacher_head, child_head, labels, 1.0)
            lm = (loss * counts).sum() * scale
        return kl, lm, none


def head_losses(
    teacher: Tensor,
    child: Tensor,
    head: Tensor,
    child_head: Tensor | None,
    labels: Tensor,
    temperature: float,
    reverse: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """KL(teacher‖child) at `temperature`, in nats, of which the share `reverse` is KL(child‖teacher), and (at temperature 1) the LM
    loss, per row.

    teacher [R, H'], child [R, H]: normed hidden states; head [V', H'] of the teacher, child_head [V, H] (None: the
    same one, which then learns nothing). Words that only one of them knows are left out; a narrower model is filled up
    with zeros. A head that learns, and KL(child‖teacher), take the plain way, in chunks of rows that are computed again in the
    backward pass.
    """
    with torch.autocast(child.device.type, enabled=False):
        own = head if child_head is None else child_head
        learns = child_head is not None and child_head.requires_grad
        dtype = child.dtype if learns else own.dtype
        teacher, child, head = teacher.to(dtype), child.to(dtype), head.to(dtype)
        if temperature != 1:  # the logits are linear in the hidden states
            teacher, child = teacher / temperature, child / temperature
        if child_head is not None:
            vocab, width = min(len(head), len(own)), max(head.shape[1], own.shape[1])
            head, child_head = (widened(w.to(dtype)[:vocab], width) for w in (head, child_head))
            teacher, child = widened(teacher, width), widened(child, width)
        # Two heads: float32 logits, for rounding would hide a small KL (one head: linear_kl takes the difference).
        chunks = Chunks(logits=None if child_head is None else torch.float32)
        if learns:
            found = linear_kl_by_rows(teacher, child, head, child_head, labels, chunks)
        else:
            found = linear_kl(teacher, child, head, child_head, labels, config=chunks, backward=chunks)
        assert found.lm_loss is not None
        kl = found.kl
        if reverse:
            own = head if child_head is None else child_head
            back = linear_kl_by_rows(child, teacher, own, None if child_head is None else head, None, chunks).kl
            kl = back if reverse == 1 else (1 - reverse) * kl + reverse * back
        return kl, found.lm_loss
