"""A teacher that does not fit beside the child: it is read layer by layer, for many steps in one pass, and what it shows waits.

What it shows of a micro-batch depends on that alone: the same operations run on it as on a teacher that is whole, however many go
together. Letters: B sequences, T tokens, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from puzzle.blocklib.plain.part import Ropes
from puzzle.heal.loss import Shown, Teacher
from puzzle.runtime.model import CausalModel, Weights
from puzzle.runtime.stream import Job, Layered, Room, Stream


class StreamedTeacher(Teacher):
    """tokens: that are looked at in one pass, if a single micro-batch has no more. Embedding and head stay on the device: the loss needs
    the head, and the child mostly shares both."""

    def __init__(self, source: Weights, layers: list[int], device: torch.device, dtype: torch.dtype, tokens: int):
        streamed = Layered(source, device, dtype, streamed=True, forward=True)
        embedding, norm = (t.to(device, dtype) for t in (source.embedding(), source.final_norm()))
        head = None if source.structure.tied else source.lm_head().to(device, dtype)
        super().__init__(CausalModel(source.structure, embedding, [], norm, head).eval(), layers)
        self.streamed, self.tokens, self.device = streamed, tokens, device

    def ahead(self, batches: Iterable[Tensor], ropes: Ropes, keep: bool) -> Iterator[Shown]:
        """What `forward` would show of every micro-batch of ids [B, T], in order."""
        window: list[Tensor] = []
        for ids in batches:
            if window and sum(one.numel() for one in window) + ids.numel() > self.tokens:
                yield from self._window(window, ropes, keep)
                window = []
            window.append(ids)
        if window:
            yield from self._window(window, ropes, keep)

    def _window(self, window: list[Tensor], ropes: Ropes, keep: bool) -> Iterator[Shown]:
        room = Room(self.device, 0)
        last, kept = self._pass(window, ropes, keep, room)
        fetched = room.fetched((stream, n) for n in range(len(window)) for stream in (*kept, last))
        for _ in window:
            hidden = [next(fetched) for _ in kept]
            yield self._shown(hidden, next(fetched))

    @torch.no_grad()
    def _pass(self, window: list[Tensor], ropes: Ropes, keep: bool, room: Room) -> tuple[Stream, list[Stream]]:
        """The stream after the last layer, and after those that are compared."""
        stream = room.filled(self.model.embed(ids.to(self.device)) for ids in window)
        kept = []
        for index, block in self.streamed.blocks():
            room.run([Job(stream, stream, lambda x: block(x, ropes))])  # noqa: B023 (run before the next block)
            if keep and index in self.layers:
                kept.append(room.copy(stream))
        return stream, kept

    @torch.no_grad()
    def _shown(self, hidden: list[Tensor], last: Tensor) -> Shown:
        return Shown(hidden=hidden, normed=self.model.final(last).flatten(0, 1))
