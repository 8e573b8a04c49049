"""One matrix after the norm, on our kernels."""

from __future__ import annotations

from torch import Tensor

from puzzle.blocklib.fast.batch import Batch, Fast, Product
from puzzle.blocklib.plain.linear import LinearMap


class FastLinear(Fast):
    def __init__(self, part: LinearMap, batch: Batch):
        super().__init__(part, batch)
        self.product = Product.of(part.linear, batch.fp8)
        self.columns = part.columns
        self.first = 0 if batch.ranks is None else batch.ranks.rank * part.columns

    def inner(self, entered: Tensor) -> Tensor:
        if self.columns < entered.shape[-1]:
            entered = entered[:, self.first : self.first + self.columns].contiguous()
        return self.product(entered)
