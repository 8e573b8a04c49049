"""The ranks of tensor parallel: each runs its share of every sub-block, and their contributions are summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """rank of world processes, each on a GPU of its own, or on the CPU."""

    rank: int
    world: int

    def sum(self, x: Tensor) -> Tensor:
        """Over all ranks, in place."""
        dist.all_reduce(x)
        return x

    def slowest(self, seconds: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each over all ranks, so that all go on alike."""
        found = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def rows(self, table: Tensor, count: int) -> Tensor:
        """This rank's `count` rows of an embedding or a head. Rows beyond the last repeat it: the first of equal logits wins."""
        at = torch.arange(self.rank * count, (self.rank + 1) * count).clamp(max=len(table) - 1)
        return table[at.to(table.device)]

    def embedded(self, ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Which of its `rows` rows are asked for, and [N, 1] whether they are its own. ids [N] of the whole vocabulary"""
        own = ids - self.rank * rows
        return own.clamp(0, rows - 1), ((own >= 0) & (own < rows))[:, None]

    def best(self, logits: Tensor) -> Tensor:
        """The word with the largest logit, where every rank has those of its own rows. [B, rows] -> [B]"""
        value, word = logits.max(-1)
        every = torch.zeros(self.world, 2, len(logits), device=logits.device)  # float32 holds every word's number
        every[self.rank] = torch.stack((value.float(), (word + self.rank * logits.shape[-1]).float()))
        values, words = self.sum(every).unbind(1)
        return words.gather(0, values.argmax(0)[None])[0].long()
