"""The FFN of squared ReLUs in plain PyTorch. Letters: B batch, T tokens, H hidden_size, F intermediate_size."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.plain.ffn import ChannelFfn
from puzzle.blocklib.relu2 import Relu2


class Relu2Ffn(ChannelFfn):
    """down(relu(up(n))²) of the normed input n."""

    def __init__(self, sub_block: Relu2):
        super().__init__(sub_block)
        hidden, width, bias = sub_block.hidden_size, sub_block.intermediate_size, sub_block.bias
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.finish()

    def channels(self, entered: Tensor) -> Tensor:
        return F.relu(self.up_proj(entered)).square()
