"""Kinds with a recurrent state beside our kernels: the two products are ours, what lies between them plain PyTorch, which a CUDA graph can hold.

Letters: B sequences, T prompt tokens, M rows in hand, H hidden_size.
"""

from __future__ import annotations

from puzzle.blocklib.fast.batch import Batch, Fast, Product, Stream
from puzzle.blocklib.plain.recurrent import RecurrentMixer, RecurrentState
from puzzle.blocklib.sub_block import MissingFace


class FastRecurrent(Fast):
    """The state is in its own dtype, whatever the cache's."""

    def __init__(self, part: RecurrentMixer, batch: Batch):
        super().__init__(part, batch)
        if batch.pool is not None:
            raise MissingFace(part.sub_block.kind, "state from a pool of caches")
        self.part = part
        self.project, self.output = Product.of(part.in_proj, batch.fp8), Product.of(part.out_proj, batch.fp8)
        self.state = RecurrentState(part.sizes, batch.size, part.out_proj.weight.data)

    def decode(self, stream: Stream, batch: Batch) -> Stream:
        entered, residual = self.enter(stream)
        return self.leave(self.output(self.part.stepped(self.project(entered), self.state.of(batch.rows)))), residual

    def prefill(self, stream: Stream, batch: Batch) -> Stream:
        entered, residual = self.enter(stream)
        projected = self.project(entered).unflatten(0, (batch.size, -1))
        mixed = self.part.mixed(projected, self.state.of(batch.rows))
        return self.leave(self.output(mixed.flatten(0, 1))), residual

    @property
    def state_bytes(self) -> int:
        return self.state.num_bytes

    def randomize(self) -> None:
        self.state.randomize()
