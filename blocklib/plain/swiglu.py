"""The gated FFN in plain PyTorch. Letters: B batch, T tokens, H hidden_size, F intermediate_size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.plain.part import Part, Ropes
from puzzle.blocklib.sub_block import Statistics
from puzzle.blocklib.swiglu import SwiGLU

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class GatedFfn(Part):
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
        """The activation that down_proj reads. [B, T, F]"""
        return self.activation(self.gate_proj(entered)) * self.up_proj(entered)

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.down_proj(self.channels(entered))

    @torch.no_grad()
    def calibrate(self, inputs: list[Tensor]) -> Statistics:
        sub_block, device = self.sub_block, inputs[0].device
        assert isinstance(sub_block, SwiGLU)
        hidden, wide = sub_block.hidden_size, {"dtype": torch.float64, "device": device}
        found = Statistics(
            num_tokens=0,
            channel_sum=torch.zeros(sub_block.intermediate_size, **wide),  # type: ignore[call-overload]
            gram=torch.zeros(hidden, hidden, **wide),  # type: ignore[call-overload]
            cross=torch.zeros(hidden, hidden, **wide),  # type: ignore[call-overload]
        )
        for x in inputs:
            entered = self.enter(x)
            channels = self.channels(entered)
            out = self.down_proj(channels).flatten(0, 1).double()
            flat = entered.flatten(0, 1).double()
            found.num_tokens += len(flat)
            found.channel_sum += channels.flatten(0, 1).double().abs().sum(dim=0)
            found.gram += flat.T @ flat
            found.cross += out.T @ flat
        return found
