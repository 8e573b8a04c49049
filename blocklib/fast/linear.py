"""One matrix after the norm, or two of low rank, on our kernels."""

from __future__ import annotations

from torch import Tensor, nn

from puzzle.blocklib.fast.batch import Batch, Fast, Product
from puzzle.blocklib.plain.linear import LinearMap


class FastLinear(Fast):
    def __init__(self, part: LinearMap, batch: Batch):
        super().__init__(part, batch)
        matrices = [module for module in part.linear.modules() if isinstance(module, nn.Linear)]
        self.products = [Product.of(matrix, batch.fp8) for matrix in matrices]
        self.columns = part.columns
        self.first = 0 if batch.ranks is None else batch.ranks.rank * part.columns

    def inner(self, entered: Tensor) -> Tensor:
        if self.columns < entered.shape[-1]:
            entered = entered[:, self.first : self.first + self.columns].contiguous()
        for product in self.products:
            entered = product(entered)
        return entered
