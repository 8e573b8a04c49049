"""The FFN of squared ReLUs in vLLM. Letters: T tokens, H hidden_size."""

from __future__ import annotations

from torch import Tensor, nn
from vllm.model_executor.layers.activation import ReLUSquaredActivation
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.vllm.place import Place


class VllmRelu2Ffn(nn.Module):
    """down(relu(up(n))²)"""

    def __init__(self, sub_block: Relu2, place: Place):
        super().__init__()
        hidden, width, bias = sub_block.hidden_size, sub_block.intermediate_size, sub_block.bias
        place.check_divides(width, "intermediate_size")
        self.up_proj = ColumnParallelLinear(hidden, width, bias=bias, **place.layer("up_proj"))
        self.down_proj = RowParallelLinear(width, hidden, bias=bias, **place.layer("down_proj"))
        self.act_fn = ReLUSquaredActivation()

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        up, _ = self.up_proj(x)
        out, _ = self.down_proj(self.act_fn(up))
        return out
