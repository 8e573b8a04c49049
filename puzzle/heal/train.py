"""One step of healing: the teacher shows, the child's loss flows back, AdamW moves the float32 weights.

On a GPU a step is a CUDA graph (puzzle/base/replay.py) and never waits for the device: a step with a non-finite gradient is
left out by the optimiser itself (`found_inf`), and counted on the device. Several ranks with a replica each sum their
gradients, which lie in one buffer, between two graphs: up to the gradients, and from them on. Under FSDP there is no graph, and the
optimiser works on each rank's part of the weights. Letters: B sequences of this rank, T tokens, S held-out sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from puzzle.base.console import say
from puzzle.base.ranks import Ranks
from puzzle.base.replay import Replayed
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.plain.part import Ropes
from puzzle.data.mixture import IGNORE
from puzzle.heal.aligned_teacher import AlignedTeacher
from puzzle.heal.loss import Learner, Seen, Shown, Teacher, Weights, head_losses
from puzzle.heal.parallel import like_sharded, local
from puzzle.heal.stored_teacher import StoredTeacher
from puzzle.heal.streamed_teacher import StreamedTeacher

MOMENTS = ("exp_avg", "exp_avg_sq")
METRICS = ("loss", "kl", "cosine", "lm", "compared", "grad_norm", "skipped", "skipped_in_a_row")


class Trainer:
    """Steps of one learner. Metrics and learning rate are tensors on the device. tutor: what teaches by step in place of `teacher`."""

    def __init__(
        self,
        learner: Learner,
        teacher: Teacher | None,
        recipe: Recipe,
        weights: Weights,
        ranks: Ranks,
        *,
        accumulate: int,
        cuda_graph: bool,
        sharded: bool = False,
        tutor: StoredTeacher | AlignedTeacher | None = None,
        old: Collection[str] = (),
        old_lr: float = 1.0,
    ):
        """old: names, within the child, of parameters whose learning rate is `old_lr` of the others'."""
        self.learner, self.teacher, self.recipe, self.weights, self.ranks = learner, teacher, recipe, weights, ranks
        self.dtype, self.device, self.accumulate = learner.dtype, ranks.device, accumulate
        self.teacher_device = self.device if teacher is None else teacher.model.embedding.weight.device
        self.names = [name for name, p in learner.child.named_parameters() if p.requires_grad]
        self.model = [p for p in learner.child.parameters() if p.requires_grad]
        # A sharded weight and its rank's part share memory: the optimiser knows plain tensors only.
        self.parts = [p if local(p) is p else nn.Parameter(local(p)) for p in self.model]
        self.lr, self.slow_lr = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.old_lr = old_lr
        groups: list[dict[str, Any]] = []
        for slow in (False, True):
            chosen = [(name, part) for name, part in zip(self.names, self.parts, strict=True) if (name in old) == slow]
            matrices = [p for name, p in chosen if p.ndim > 1 and not name.endswith("bias")]  # experts stack theirs
            rate = {"lr": self.slow_lr if slow else self.lr}
            groups.append({"params": matrices, "weight_decay": recipe.weight_decay, **rate})
            vectors = [p for name, p in chosen if p.ndim <= 1 or name.endswith("bias")]
            groups.append({"params": vectors, "weight_decay": 0.0, **rate})
        self.optimizer = torch.optim.AdamW(
            groups, betas=(recipe.beta1, recipe.beta2), fused=True, capturable=self.device.type == "cuda"
        )
        for part in self.parts:
            state = {name: torch.zeros_like(part, memory_format=torch.preserve_format) for name in MOMENTS}
            self.optimizer.state[part] = {"step": torch.zeros((), device=self.device), **state}
        self._skipped = torch.zeros(2, device=self.device)  # in all, and in a row
        self._scale = torch.ones((), device=self.device)  # one over the tokens of the step that count
        self.tutor, self.streamed = tutor, teacher if isinstance(teacher, StreamedTeacher) else None
        own_gpu = self.device.type == "cuda" and not sharded and self.teacher_device == self.device
        self._graphed = cuda_graph and own_gpu and self.streamed is None and tutor is None
        self.sharded, self.replicated = sharded, ranks.world > 1 and not sharded
        if self.replicated:  # gradients of all weights, and the sums of the metrics: they stay where they are
            self._sums = torch.zeros(sum(p.numel() for p in self.model) + 5, device=self.device)
            *views, self._total = self._sums.split([*(p.numel() for p in self.model), 5])
            for parameter, view in zip(self.model, views, strict=True):
                parameter.grad = view.view_as(parameter)

    @property
    def num_trained(self) -> int:
        """Parameters that learn, over all ranks."""
        return sum(p.numel() for p in self.parts) * (self.ranks.world if self.sharded else 1)

    def begin_stage(self, seq_len: int, coming: Iterable[Tensor] = (), lessons: Iterator[Seen] | None = None) -> None:
        """Sequences have this length from now on, to be called before the first step too. coming: the batches of all its steps from
        here on, at which a streamed teacher looks ahead; lessons: what a tutor shows of them, by micro-batch."""
        self._ropes = self._ropes_of(seq_len)  # made here: a CUDA graph cannot copy them from the host
        ids = (ids for batch in coming for ids in batch[0].chunk(self.accumulate))
        self._lessons = self._ahead(ids, self._ropes, self.weights) if lessons is None else lessons
        self._step, self._first, self._second = map(Replayed, (self._whole_step, self._backward, self._update))

    def _ropes_of(self, seq_len: int) -> tuple[Ropes, Ropes | None]:
        """Tables of the child and of the teacher, which may have other frequencies; rounded here, once for all layers."""
        models = (self.learner.child, None if self.teacher is None else self.teacher.model)
        child, teacher = (
            None if m is None else {n: (c.to(self.dtype), s.to(self.dtype)) for n, (c, s) in m.ropes(seq_len).items()}
            for m in models
        )
        assert child is not None
        return child, teacher

    def step(self, batch: Tensor, step: int) -> Tensor:
        """Train on ids and labels [2, B, T] of this rank. Returns METRICS of the whole step, on the device."""
        self.lr.fill_(self.recipe.lr_at(step))
        self.slow_lr.fill_(self.old_lr * self.recipe.lr_at(step))
        batch = batch.to(self.device, non_blocking=True)
        if not self.replicated:
            return self._run(self._step, batch).clone()
        self._count(batch)
        total = self._run(self._first, batch)
        self.ranks.sum(self._sums)
        return self._run(self._second, total).clone()

    def _run(self, replayed: Replayed, x: Tensor) -> Tensor:
        """By its CUDA graph, where there can be one."""
        if not self._graphed:
            return replayed.function(x)
        try:
            return replayed(x)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            say(f"no CUDA graph here ({str(error).splitlines()[0]}): steps run one kernel at a time")
            self._graphed = False
            for part in () if self.replicated else self.parts:
                part.grad = None
            return replayed.function(x)

    def _whole_step(self, batch: Tensor) -> Tensor:
        self._count(batch)
        return self._update(self._backward(batch))

    def _count(self, batch: Tensor) -> None:
        self._scale.copy_(1 / self.ranks.sum((batch[1] != IGNORE).sum().float()).clamp(min=1))

    def _backward(self, batch: Tensor) -> Tensor:
        """Gradients of this rank's rows. Returns their sums of loss, KL, cosine distance and LM loss, and of how many tokens the KL is [5]."""
        if self.replicated:
            self._sums.zero_()
        total = self._total if self.replicated else torch.zeros(5, device=self.device)
        for ids, labels in zip(*(x.chunk(self.accumulate) for x in batch), strict=True):
            with self._autocast():
                # What the teacher showed has no name here: it would stay beside what it shows of the next micro-batch.
                found = self._compared(ids, labels, self._ropes, self._scale, self.weights, self._lessons)[0]
            (found[0] * (self.ranks.world if self.sharded else 1)).backward()  # FSDP takes the mean over ranks
            total += found.detach()
        return total

    def _update(self, total: Tensor) -> Tensor:
        """The optimiser's step, from gradients that are summed over ranks already. Returns METRICS."""
        gradients = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in self.model]
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.grad = gradient
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        norm = (self.ranks.sum(squares) if self.sharded else squares).sqrt()
        broken = (~torch.isfinite(norm)).float()
        torch._foreach_mul_(gradients, (self.recipe.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.found_inf = broken  # type: ignore[attr-defined]
        self.optimizer.step()
        for model, part in () if self.replicated else zip(self.model, self.parts, strict=True):
            model.grad = part.grad = None
        self._skipped += broken
        self._skipped[1] *= broken
        return torch.cat((self.ranks.sum(total) if self.sharded else total, norm[None], self._skipped))

    def _ahead(
        self, ids: Iterable[Tensor], ropes: tuple[Ropes, Ropes | None], weights: Weights
    ) -> Iterator[Seen] | None:
        """What a streamed teacher shows of these micro-batches; None where it is whole."""
        if self.streamed is None or ropes[1] is None:
            return None
        return self.streamed.ahead(ids, ropes[1], weights.cosine > 0)

    def _compared(
        self,
        ids: Tensor,
        labels: Tensor,
        ropes: tuple[Ropes, Ropes | None],
        scale: Tensor,
        weights: Weights,
        lessons: Iterator[Seen] | None,
    ) -> tuple[Tensor, Seen]:
        """What the learner returns, and what the teacher showed it: the next of `lessons`, or now."""
        shown: Seen = None
        if lessons is not None:
            shown = next(lessons)
        elif self.teacher is not None:
            with torch.no_grad():
                shown = self.teacher(ids.to(self.teacher_device), ropes[1], weights.cosine > 0).to(self.device)
        return self.learner(ids, labels, ropes[0], shown, scale, weights), shown

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()  # no weight cache below: inside a CUDA graph it would keep stale copies
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    @torch.no_grad()
    def evaluate(self, rows: Tensor, batch_size: int) -> dict[str, float]:
        """Means over the held-out ids and labels [2, S, T] that count, in nats per token: the child's LM loss and, with a
        teacher, KL at temperature 1 (by a tutor: `kl_top`, over the words that are stored and the rest, or `kl_aligned`, of the tokens at
        which it is compared), cosine distance and the teacher's own LM loss. batch_size: rows of a rank at once."""
        ropes = self._ropes_of(rows.shape[2])
        with_teacher = self.teacher is not None
        with_states = with_teacher and bool(self.learner.layers)
        weights = Weights(kl=float(with_teacher or self.tutor is not None), cosine=float(with_states), lm=1.0)
        sums = torch.zeros(7, dtype=torch.float64, device=self.device)

        def places() -> Iterator[slice]:
            for start in range(0, rows.shape[1], batch_size * self.ranks.world):
                begin = start + self.ranks.rank * batch_size
                yield slice(begin, min(begin + batch_size, rows.shape[1]))

        def batches() -> Iterator[Tensor]:
            for place in places():
                mine = rows[:, place].to(self.device)
                if not mine.shape[1]:  # every rank takes part in every pass: this one with a row that does not count
                    mine = torch.stack((rows[0, :1], torch.full_like(rows[1, :1], IGNORE))).to(self.device)
                yield mine

        lessons = self._ahead((ids for ids, _ in batches()), ropes, weights)
        if self.tutor is not None:
            kept = self.tutor
            lessons = (kept.held_out(p if p.stop > p.start else slice(0, 1), rows.shape[2]) for p in places())
        for batch in batches():
            sums += self._held_out(batch, ropes, weights, lessons)

        _, kl, cosine, loss, compared, own, count = self.ranks.sum(sums).tolist()
        result = {"loss": loss / count}
        if with_teacher:
            result |= {"kl": kl / count, "teacher_loss": own / count}
        if self.tutor is not None:
            result |= self.tutor.told(kl / compared)
        return result | ({"cosine": cosine / count} if with_states else {})

    def _held_out(
        self, batch: Tensor, ropes: tuple[Ropes, Ropes | None], weights: Weights, lessons: Iterator[Seen] | None
    ) -> Tensor:
        """Sums over ids and labels [2, B, T]: what the learner returns, the teacher's own LM loss, and how many tokens count [7]."""
        ids, labels = batch
        one = torch.ones((), device=self.device)
        with self._autocast():
            found, shown = self._compared(ids, labels, ropes, one, weights, lessons)
            own = one.new_zeros(())
            if isinstance(shown, Shown) and self.teacher is not None:
                head = self.teacher.model.head_weight.to(self.device)
                loss = head_losses(shown.normed, shown.normed, head, None, labels.flatten(), 1.0)[1]
                own = (loss * (labels.flatten() != IGNORE)).sum()
        return torch.cat((found, own[None], (labels != IGNORE).sum()[None])).double()

    def state(self) -> dict[str, Tensor]:
        """All that a step changes, by name; sharded tensors under FSDP. Shares memory with the trainer."""
        found: dict[str, Tensor] = {"skipped": self._skipped}
        for name, model, part in zip(self.names, self.model, self.parts, strict=True):
            state = self.optimizer.state[part]
            found[f"{name}|weight"] = model.detach()
            found[f"{name}|step"] = state["step"]
            for moment in MOMENTS:
                found[f"{name}|{moment}"] = like_sharded(state[moment], model)
        return found
