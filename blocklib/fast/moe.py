"""The mixture of experts on a GPU: the plain module's grouped products between our fused norms."""

from __future__ import annotations

from torch import Tensor

from puzzle.blocklib.fast.batch import Batch, Fast
from puzzle.blocklib.plain.moe import SparseMoe
from puzzle.blocklib.sub_block import MissingFace


class FastMoe(Fast):
    """Decode and prefill differ only in the number of rows. Raises MissingFace for weights in fp8."""

    def __init__(self, part: SparseMoe, batch: Batch):
        super().__init__(part, batch)
        if batch.fp8:
            raise MissingFace(part.sub_block.kind, "path on our kernels in fp8")
        self.part = part

    def inner(self, entered: Tensor) -> Tensor:
        return self.part.mixed(entered)
