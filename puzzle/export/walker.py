"""A child run layer by layer, of which one is in memory at a time. Letters: B sequences, T tokens, E hidden_size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from puzzle.blocklib.plain.part import loaded
from puzzle.export.child import Child
from puzzle.runtime.model import Block, CausalModel


class Walker:
    """A child on one device, layer by layer, and the held-out ids [B, T] it runs on."""

    def __init__(self, child: Child, sequences: Tensor, device: torch.device, dtype: torch.dtype):
        self.child, self.device, self.dtype = child, device, dtype
        self.ids = [ids.long().to(device) for ids in sequences.split(4)]
        embedding = child.read_embedding().to(device, dtype)
        head = None if child.tied else child.read_head().to(device, dtype)
        ends = CausalModel(child.structure, embedding, [], child.read_final_norm().to(device, dtype), head)
        self.ends = ends.requires_grad_(False).eval()
        self.ropes = self.ends.ropes(sequences.shape[1])

    def blocks(self) -> Iterator[Block]:
        """The layers in order, one in memory at a time."""
        for layer in self.child.layers:
            parts = {}
            for slot, sub_block in layer.slots.items():
                weights = {name: value.to(self.device, self.dtype) for name, value in layer.read(slot).items()}
                parts[slot] = loaded(sub_block, weights)
            yield Block(parts)

    def embedded(self) -> list[Tensor]:
        """The stream before the first layer, batch by batch [B, T, E], in host memory."""
        return [self.ends.embed(ids).cpu() for ids in self.ids]

    def added(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the sub-blocks before the last add to x [B, T, E], and what the last one, the FFN, adds to that."""
        *before, last = list(block.parts().values())
        total = torch.zeros_like(x)
        for part in before:
            added = part(x, self.ropes)
            x, total = x + added, total + added
        return total, last(x, self.ropes)
