"""One matrix after the norm, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor, nn

from puzzle.blocklib.linear import Linear
from puzzle.blocklib.plain.part import Part, Ropes


class LinearMap(Part):
    """W n of the normed input n. [B, T, H] -> [B, T, H]"""

    def __init__(self, sub_block: Linear):
        super().__init__(sub_block)
        self.linear = nn.Linear(sub_block.hidden_size, sub_block.hidden_size, bias=False)
        self.finish()

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.linear(entered)
