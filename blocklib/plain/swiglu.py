"""The gated FFN in plain PyTorch. Letters: B batch, T tokens, H hidden_size, F intermediate_size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.plain.part import Part, Ropes
from puzzle.blocklib.sub_block import Statistics, SubBlock
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
        return self.gated(self.gate_proj(entered), self.up_proj(entered))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.down_proj(self.channels(entered))

    def prefixes(self, entered: Tensor, ropes: Ropes, sub_blocks: Sequence[SubBlock]) -> list[Tensor]:
        """At the cost of the widest: every segment of channels is multiplied once, and a width is the sum of its segments, so that
        the gradient of a segment's weights is that of the sum of all widths that have it."""
        if len(sub_blocks) == 1:
            return [self.leave(self.inner(entered, ropes))]
        widths = [s.intermediate_size for s in sub_blocks if isinstance(s, SwiGLU)]
        sizes = [b - a for a, b in pairwise([0, *widths])]
        channels = self.channels(entered).split(sizes, dim=-1)
        down = self.down_proj.weight.split(sizes, dim=1)
        segments = [F.linear(some, weight) for some, weight in zip(channels, down, strict=True)]
        sums = accumulate(segments)
        bias = self.down_proj.bias
        return [self.leave(y if bias is None else y + bias.to(y.dtype)) for y in sums]

    def beginning(self, tensors: Mapping[str, Tensor], sub_block: SubBlock) -> dict[str, Tensor]:
        assert isinstance(sub_block, SwiGLU)
        width, cut = sub_block.intermediate_size, dict(tensors)
        for name in tensors:
            if name.startswith(("gate_proj.", "up_proj.")):
                cut[name] = tensors[name][:width]
            elif name == "down_proj.weight":
                cut[name] = tensors[name][:, :width].contiguous()
        return cut

    @torch.no_grad()
    def calibrate(self, inputs: list[Tensor]) -> Statistics:
        sub_block, device = self.sub_block, inputs[0].device
        assert isinstance(sub_block, SwiGLU)
        hidden, wide = sub_block.hidden_size, {"dtype": torch.float64, "device": device}

        @torch.no_grad()
        def channel_gram() -> Tensor:
            flat = (self.channels(self.enter(x)).flatten(0, 1).double() for x in inputs)
            total = torch.zeros(sub_block.intermediate_size, sub_block.intermediate_size, **wide)  # type: ignore[call-overload]
            for channels in flat:
                total.addmm_(channels.T, channels)
            return total

        found = Statistics(
            num_tokens=0,
            channel_sum=torch.zeros(sub_block.intermediate_size, **wide),  # type: ignore[call-overload]
            gram=torch.zeros(hidden, hidden, **wide),  # type: ignore[call-overload]
            cross=torch.zeros(hidden, hidden, **wide),  # type: ignore[call-overload]
            channel_gram=channel_gram,
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
