"""The gated FFN in plain PyTorch. Letters: B batch, T tokens, H hidden_size, F intermediate_size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.plain.ffn import ChannelFfn
from puzzle.blocklib.swiglu import SwiGLU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class GatedFfn(ChannelFfn):
    """down(act(gate(n)) · up(n)) of the normed input n."""

    def __init__(self, sub_block: SwiGLU):
        super().__init__(sub_block)
        self.activation = ACTIVATIONS[sub_block.activation]
        hidden, width, bias = sub_block.hidden_size, sub_block.intermediate_size, sub_block.bias
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.finish()

    def channels(self, entered: Tensor) -> Tensor:
        return self.gated(self.gate_proj(entered), self.up_proj(entered))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up
