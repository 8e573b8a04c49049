"""One matrix after the norm, or two of low rank, in vLLM. Letters: T tokens, H hidden_size."""

from __future__ import annotations

from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from puzzle.blocklib.linear import Linear
from puzzle.blocklib.vllm.place import Place


class VllmLinear(nn.Module):
    """Rows of the matrix are shared by the ranks, and what they give is gathered: no sum is split. Of two matrices what passes between
    them is shared, as an FFN's channels are."""

    def __init__(self, sub_block: Linear, place: Place):
        super().__init__()
        size, rank, name = sub_block.hidden_size, sub_block.rank, place.matrix
        self.name = name
        if rank is None:
            place.check_divides(size, "hidden_size")
            whole = ColumnParallelLinear(size, size, bias=False, gather_output=True, **place.layer(name))
            self.add_module(name, whole)
            return
        place.check_divides(rank, "rank")
        v = ColumnParallelLinear(size, rank, bias=False, **place.layer(f"{name}.v"))
        u = RowParallelLinear(rank, size, bias=False, **place.layer(f"{name}.u"))
        self.add_module(name, nn.ModuleDict({"v": v, "u": u}))

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        found = getattr(self, self.name)
        for matrix in found.values() if isinstance(found, nn.ModuleDict) else [found]:
            x, _ = matrix(x)
        return x
