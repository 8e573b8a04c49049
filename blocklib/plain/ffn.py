"""What FFNs of channels share in plain PyTorch. Letters: B batch, T tokens, H hidden_size, F intermediate_size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.ffn import Ffn
from puzzle.blocklib.moments import Statistics
from puzzle.blocklib.plain.part import Part, Ropes, statistics_of
from puzzle.blocklib.sub_block import MissingFace, SubBlock


class ChannelFfn(Part):
    """down(channels(n)) of the normed input n."""

    down_proj: nn.Linear

    def channels(self, entered: Tensor) -> Tensor:
        """The activation that down_proj reads. [B, T, H] -> [B, T, F]"""
        raise MissingFace(self.sub_block.kind, "channels")

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.down_proj(self.channels(entered))

    def prefixes(self, entered: Tensor, ropes: Ropes, sub_blocks: Sequence[SubBlock]) -> list[Tensor]:
        """At the cost of the widest: every segment of channels is multiplied once, and a width is the sum of its segments, so that
        the gradient of a segment's weights is that of the sum of all widths that have it."""
        if len(sub_blocks) == 1:
            return [self.leave(self.inner(entered, ropes))]
        widths = [s.intermediate_size for s in sub_blocks if isinstance(s, Ffn)]
        sizes = [b - a for a, b in pairwise([0, *widths])]
        channels = self.channels(entered).split(sizes, dim=-1)
        down = self.down_proj.weight.split(sizes, dim=1)
        segments = [F.linear(some, weight) for some, weight in zip(channels, down, strict=True)]
        sums = accumulate(segments)
        bias = self.down_proj.bias
        return [self.leave(y if bias is None else y + bias.to(y.dtype)) for y in sums]

    def beginning(self, tensors: Mapping[str, Tensor], sub_block: SubBlock) -> dict[str, Tensor]:
        assert isinstance(sub_block, Ffn)
        width, cut = sub_block.intermediate_size, dict(tensors)
        for name in tensors:
            if name.startswith(("gate_proj.", "up_proj.")):
                cut[name] = tensors[name][:width]
            elif name == "down_proj.weight":
                cut[name] = tensors[name][:, :width].contiguous()
        return cut

    @torch.no_grad()
    def calibrate(self, inputs: list[Tensor]) -> Statistics:
        return statistics_of(self, inputs, self.channels, self.down_proj.in_features)
