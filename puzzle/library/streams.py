"""Residual streams that enter a group of layers: from the embedding, from the process that has the layers before, or kept in host
memory by the group before.

Letters: B batch, T tokens, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Split = Literal["train", "validation"]


class Beside:
    """Batches on their way between host memory and a GPU while it computes: a pinned buffer and one batch at a time each way."""

    def __init__(self, like: Tensor):
        self.device = like.device
        self._stream = torch.cuda.Stream(like.device)
        self._in, self._out = (torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(2))
        self._in_done, self._out_done = torch.cuda.Event(), torch.cuda.Event()
        self._arriving: tuple[Tensor, Tensor] | None = None  # (in host memory, on the device)
        self._leaving: Tensor | None = None  # where in host memory what is in `_out` belongs

    def bring(self, kept: Tensor) -> None:
        """Start to bring what lies in host memory."""
        if self._leaving is kept:
            self.settle()
        self._in_done.synchronize()
        self._in.copy_(kept)
        with torch.cuda.stream(self._stream):
            self._arriving = kept, self._in.to(self.device, non_blocking=True)
            self._in_done.record()

    def take(self, kept: Tensor) -> Tensor:
        """It, on the device; at once if it was brought."""
        if self._arriving is None or self._arriving[0] is not kept:
            self.bring(kept)
        assert self._arriving is not None
        x, self._arriving = self._arriving[1], None
        here = torch.cuda.current_stream(self.device)
        here.wait_event(self._in_done)
        x.record_stream(here)
        return x

    def send(self, x: Tensor, kept: Tensor) -> None:
        """Start to write x to host memory. The device overwrites x only after that."""
        self.settle()
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._out.copy_(x, non_blocking=True)
            self._out_done.record()
        here.wait_event(self._out_done)
        self._leaving = kept

    def settle(self) -> None:
        """What was sent is there."""
        if self._leaving is not None:
            self._out_done.synchronize()
            self._leaving.copy_(self._out)
            self._leaving = None


class ResidualStreams:
    """Batches [B, T, H] of both splits, by step. A batch that was never kept comes from `embed`; `like` gives an empty one.

    Several processes are a chain: what leaves one group is sent to the process that has the next.
    """

    def __init__(self, embed: Callable[[Split, int], Tensor], like: Callable[[Split, int], Tensor]):
        self._embed, self._like = embed, like
        self._kept: dict[tuple[Split, int], Tensor] = {}
        self._sent: tuple[Any, Tensor] | None = None
        self._beside: Beside | None = None  # of the batches to train on, which are all of one shape
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
        if split == "train" and self._beside is not None:
            x = self._beside.take(kept)
            if (split, step + 1) in self._kept:
                self._beside.bring(self._kept[split, step + 1])
            return x
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
            kept = self._kept.get((split, step))
            if kept is None:
                kept = self._kept[split, step] = torch.empty_like(x, device="cpu")
            if split == "train" and x.is_cuda:
                self._beside = self._beside or Beside(x)
                self._beside.send(x, kept)
            else:
                kept.copy_(x)

    def finish(self) -> None:
        """Wait until what was sent has been taken, and what is kept is there."""
        if self._beside is not None:
            self._beside.settle()
        if self._sent is not None:
            self._sent[0].wait()
            self._sent = None
