"""A child run layer by layer, with streams of its own that wait between layers. Letters: B sequences, T tokens, E hidden_size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.export.child import Child
from puzzle.parents.structure import Structure
from puzzle.runtime.model import Block
from puzzle.runtime.residency import Residency
from puzzle.runtime.stream import Layered, Room, Stream

AT_ONCE = 4  # sequences


@dataclass(frozen=True, slots=True)
class ChildWeights:
    """A child as `runtime.model.Weights` are read."""

    child: Child

    @property
    def structure(self) -> Structure:
        return self.child.structure

    def weights(self, layer: int, slot: str) -> dict[str, Tensor]:
        return self.child.layers[layer].read(slot)

    def embedding(self) -> Tensor:
        return self.child.read_embedding()

    def final_norm(self) -> Tensor:
        return self.child.read_final_norm()

    def lm_head(self) -> Tensor:
        return self.child.read_embedding() if self.child.tied else self.child.read_head()


class Walker:
    """A child on one device, layer by layer, and the held-out ids [B, T] it runs on. plan: how, and with how many streams beside its
    own; None: streamed, with as many as there are."""

    def __init__(
        self, child: Child, sequences: Tensor, device: torch.device, dtype: torch.dtype, plan: Residency | None = None
    ):
        self.child, self.device, self.dtype = child, device, dtype
        streamed = plan is None or plan.streamed
        self.model = Layered(ChildWeights(child), device, dtype, streamed=streamed, forward=plan is not None)
        self.room = Room(device, 0 if plan is None else plan.on_device)
        self.together = None if plan is None else plan.together
        self.ids = [ids.long().to(device) for ids in sequences.split(AT_ONCE if plan is None else plan.batch_size)]
        self.ropes = self.model.ropes(sequences.shape[1])

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """(number, layer) in order."""
        return self.model.blocks()

    def embedded(self) -> Stream:
        """The stream before the first layer."""
        return self.room.filled(self.model.embedded(self.ids))

    def added(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the sub-blocks before the last add to x [B, T, E], and what the last one, the FFN, adds to that."""
        *before, last = list(block.parts().values())
        total = torch.zeros_like(x)
        for part in before:
            added = part(x, self.ropes)
            x, total = x + added, total + added
        return total, last(x, self.ropes)
