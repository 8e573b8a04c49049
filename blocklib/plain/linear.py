"""One matrix after the norm, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor, nn

from puzzle.blocklib.linear import Linear
from puzzle.blocklib.plain.part import Part, Ropes


class LinearMap(Part):
    """W n of the normed input n, or of those of its channels that this rank's columns take, from `first` on. [B, T, H] -> [B, T, H]"""

    def __init__(self, sub_block: Linear):
        super().__init__(sub_block)
        self.first, self.columns = 0, sub_block.columns or sub_block.hidden_size
        self.linear = nn.Linear(self.columns, sub_block.hidden_size, bias=False)
        self.finish()

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.linear(entered[..., self.first : self.first + self.columns])
