"""The gated FFN in vLLM. Letters: T tokens, H hidden_size."""

from __future__ import annotations

from torch import Tensor, nn
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from puzzle.blocklib.swiglu import SwiGLU
from puzzle.blocklib.vllm.place import Place


class VllmGatedFfn(nn.Module):
    """down(act(gate(n)) · up(n)), gate and up as one product."""

    def __init__(self, sub_block: SwiGLU, place: Place):
        super().__init__()
        hidden, width, bias = sub_block.hidden_size, sub_block.intermediate_size, sub_block.bias
        place.check_divides(width, "intermediate_size")
        self.gate_up_proj = MergedColumnParallelLinear(hidden, [width, width], bias=bias, **place.layer("gate_up_proj"))
        self.down_proj = RowParallelLinear(width, hidden, bias=bias, **place.layer("down_proj"))
        self.act_fn = SiluAndMul() if sub_block.activation == "silu" else GeluAndMul(approximate="tanh")

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        both, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act_fn(both))
        return out
