"""Residual streams that enter a group of layers: from the embedding, or kept in host memory by the group before.

Letters: B batch, T tokens, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Split = Literal["train", "validation"]


class ResidualStreams:
    """Batches [B, T, H] of both splits, by step. A batch that was never kept comes from `embed`."""

    def __init__(self, embed: Callable[[Split, int], Tensor]):
        self._embed = embed
        self._kept: dict[tuple[Split, int], Tensor] = {}

    def get(self, split: Split, step: int) -> Tensor:
        """What enters the current group, on the device of the embedding."""
        if (split, step) not in self._kept:
            return self._embed(split, step)
        kept = self._kept[split, step]
        return kept.to(self.device, non_blocking=True) if kept.device != self.device else kept.clone()

    def keep(self, split: Split, step: int, x: Tensor) -> None:
        """Leave a group's output for the next group; it overwrites the input of the same step."""
        self.device = x.device
        if (split, step) in self._kept:
            self._kept[split, step].copy_(x)
        else:
            self._kept[split, step] = x.to("cpu", copy=True)
