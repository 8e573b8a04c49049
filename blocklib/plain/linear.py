"""One matrix after the norm, or two of low rank, in plain PyTorch. Letters: B batch, T tokens, H hidden_size."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from puzzle.blocklib.linear import Linear
from puzzle.blocklib.plain.part import Part, Ropes


class LinearMap(Part):
    """W n of the normed input n, or of those of its channels that this rank's columns take, from `first` on; U V n with a rank.
    [B, T, H] -> [B, T, H]"""

    def __init__(self, sub_block: Linear):
        super().__init__(sub_block)
        hidden, rank = sub_block.hidden_size, sub_block.rank
        self.first, self.columns = 0, sub_block.columns or hidden
        self.linear: nn.Module = nn.Linear(self.columns, hidden, bias=False)
        if rank is not None:
            factors = {"v": nn.Linear(hidden, rank, bias=False), "u": nn.Linear(rank, hidden, bias=False)}
            self.linear = nn.Sequential(OrderedDict(factors))
        self.finish()

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.linear(entered[..., self.first : self.first + self.columns])
