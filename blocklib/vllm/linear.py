"""One matrix after the norm, in vLLM."""

from __future__ import annotations

from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear

from puzzle.blocklib.linear import Linear
from puzzle.blocklib.vllm.place import Place


class VllmLinear(nn.Module):
    """Rows of the matrix are shared by the ranks, and what they give is gathered: no sum is split."""

    def __init__(self, sub_block: Linear, place: Place):
        super().__init__()
        size, self.name = sub_block.hidden_size, place.matrix
        place.check_divides(size, "hidden_size")
        self.add_module(
            self.name, ColumnParallelLinear(size, size, bias=False, gather_output=True, **place.layer(self.name))
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        out, _ = getattr(self, self.name)(x)
        return out
