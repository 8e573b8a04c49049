"""The FFN of squared ReLUs on our kernels: two products with the activation between."""

from __future__ import annotations

import torch
from torch import Tensor

from puzzle.blocklib.fast.batch import Batch, Fast, Product
from puzzle.blocklib.plain.relu2 import Relu2Ffn


class FastRelu2(Fast):
    """Two products on our kernels, the square between them in PyTorch."""

    def __init__(self, part: Relu2Ffn, batch: Batch):
        super().__init__(part, batch)
        self.up, self.down = Product.of(part.up_proj, batch.fp8), Product.of(part.down_proj, batch.fp8)

    def inner(self, entered: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(entered)).square())
