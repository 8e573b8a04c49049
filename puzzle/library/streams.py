"""Residual streams that enter a group of layers: from the embedding, from the process that has the layers before, or kept in host
memory by the group before.

Letters: B batch, T tokens, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

Split = Literal["train", "validation"]


class ResidualStreams:
    """Batches [B, T, H] of both splits, by step. A batch that was never kept comes from `embed`; `like` gives an empty one.

    Several processes are a chain: what leaves one group is sent to the process that has the next.
    """

    def __init__(self, embed: Callable[[Split, int], Tensor], like: Callable[[Split, int], Tensor]):
        self._embed, self._like = embed, like
        self._kept: dict[tuple[Split, int], Tensor] = {}
        self._sent: tuple[Any, Tensor] | None = None
        self.connect(None, None, keep=False)

    def connect(self, before: int | None, after: int | None, *, keep: bool) -> None:
        """From now on streams come from process `before` and go to `after`; without one they are kept, if `keep`."""
        self._before, self._after, self._keep = before, after, keep and after is None
        if before is not None:
            self._kept.clear()

    @property
    def sends(self) -> bool:
        return self._after is not None

    def get(self, split: Split, step: int) -> Tensor:
        """What enters the current group, on the device of the embedding."""
        if self._before is not None:
            x = self._like(split, step)
            dist.recv(x, self._before)
            return x
        if (split, step) not in self._kept:
            return self._embed(split, step)
        kept = self._kept[split, step]
        return kept.to(self.device, non_blocking=True) if kept.device != self.device else kept.clone()

    def put(self, split: Split, step: int, x: Tensor, *, last: bool = True) -> None:
        """What leaves the current group: sent on, or left for the next group in place of what entered this one. last: this
        step will not pass again."""
        if self._after is not None:
            self.finish()
            sent = x.clone()  # a graph's output is overwritten while it is on its way
            self._sent = dist.isend(sent, self._after), sent
        elif self._keep and last:
            self.device = x.device
            if (split, step) in self._kept:
                self._kept[split, step].copy_(x)
            else:
                self._kept[split, step] = x.to("cpu", copy=True)

    def finish(self) -> None:
        """Wait until what was sent has been taken."""
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None
