"""A sub-block as a module in plain PyTorch: the twin that everything else is held against.

It owns its norms and gives its contribution to the residual stream, in training, in a prefill and in a decode step.
Letters: B batch, T tokens, H hidden_size, R rotary dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.moments import Moments, Statistics
from puzzle.blocklib.sub_block import MissingFace, Normed, SubBlock

Ropes = Mapping[str, tuple[Tensor, Tensor]]  # by name: cos and sin of the tokens in hand [T, R]


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 as Llama does (arXiv 1910.07467). offset: the scale is 1 + weight, and multiplies in
    float32, as in Gemma."""

    def __init__(self, size: int, eps: float, offset: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if self.offset:
            return F.rms_norm(x.float(), (x.shape[-1],), 1 + self.weight.float(), self.eps).to(x.dtype)
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight.float(), self.eps)
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class Part(nn.Module):
    """The base of all kinds' modules. A kind fills in `inner`; one with a state also `new_state`, `prefill` and `decode`."""

    rms_norm: type[RMSNorm] = RMSNorm  # of all norms in it

    def __init__(self, sub_block: SubBlock):
        super().__init__()
        self.sub_block = sub_block
        if isinstance(sub_block, Normed) and sub_block.norm_before:
            self.norm = self.rms_norm(sub_block.hidden_size, sub_block.norm_eps, sub_block.norm_offset)

    def finish(self) -> None:
        """Add the norm after; called by a kind once its own modules stand, so that it comes last."""
        sub_block = self.sub_block
        if isinstance(sub_block, Normed) and sub_block.norm_after:
            self.post_norm = self.rms_norm(sub_block.hidden_size, sub_block.norm_eps, sub_block.norm_offset)

    def enter(self, x: Tensor) -> Tensor:
        """What the sub-block's own matrices read. [B, T, H]"""
        return self.norm(x) if isinstance(self.sub_block, Normed) and self.sub_block.norm_before else x

    def leave(self, y: Tensor) -> Tensor:
        """From what they give to the contribution. [B, T, H]"""
        if not isinstance(self.sub_block, Normed):
            return y
        y = self.post_norm(y) if self.sub_block.norm_after else y
        return y if self.sub_block.residual_scale == 1 else y * self.sub_block.residual_scale

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        """What stands between the norms. [B, T, H] -> [B, T, H]"""
        raise MissingFace(self.sub_block.kind, "plain forward")

    def forward(self, x: Tensor, ropes: Ropes) -> Tensor:
        """The contribution of whole sequences, causal. [B, T, H] -> [B, T, H]"""
        return self.leave(self.inner(self.enter(x), ropes))

    def prefixes(self, entered: Tensor, ropes: Ropes, sub_blocks: Sequence[SubBlock]) -> list[Tensor]:
        """The contributions of sub-blocks that each begin the next (`SubBlock.begins`), the last one this whole, of what `enter` gave.
        [B, T, H] each"""
        if len(sub_blocks) > 1:
            raise MissingFace(self.sub_block.kind, "prefixes")
        return [self.leave(self.inner(entered, ropes))]

    def beginning(self, tensors: Mapping[str, Tensor], sub_block: SubBlock) -> dict[str, Tensor]:
        """Of `tensors`, by name as in this module, what belongs to a sub-block that begins it."""
        if sub_block != self.sub_block:
            raise MissingFace(self.sub_block.kind, "prefixes")
        return dict(tensors)

    def add(self, x: Tensor, ropes: Ropes) -> Tensor:
        """x with the contribution added. [B, T, H] -> [B, T, H]"""
        return x + self(x, ropes)

    # -- inference: static batches, all sequences of one length -----------------------------------------------

    def new_state(self, batch: int, max_length: int, like: Tensor) -> Any:
        """What `batch` sequences of up to `max_length` tokens keep, in the dtype and on the device of `like`: an object with
        `num_bytes` and `randomize()`, or None for a kind without state."""
        if self.sub_block.state():
            raise MissingFace(self.sub_block.kind, "plain decode with state")
        return None

    def prefill(self, x: Tensor, ropes: Ropes, state: Any) -> Tensor:
        """Whole prompts [B, T, H] with the contribution added; fills the state. ropes: of positions 0…T-1."""
        assert state is None, "a kind with a state has a prefill of its own"
        return self.add(x, ropes)

    def decode(self, x: Tensor, ropes: Ropes, state: Any, position: int) -> Tensor:
        """One token of each sequence [B, 1, H], at `position`, with the contribution added. ropes: that position's row."""
        assert state is None, "a kind with a state has a decode of its own"
        return self.add(x, ropes)

    def calibrate(self, inputs: list[Tensor]) -> Statistics | None:
        """Statistics over the residual streams [B, T, H] that enter; None for kinds whose replacements need none."""
        return None

    @torch.no_grad()
    def moments(self, inputs: list[Tensor], ropes: Ropes) -> Moments:
        """Over the residual streams [B, T, H] that enter, which are whole sequences: a kind that mixes tokens sees what it always sees."""
        hidden, seen = inputs[0].shape[-1], 0
        grams, crosses = torch.zeros(2, 2, hidden, hidden, dtype=torch.float64, device=inputs[0].device)
        for x in inputs:
            entered = self.enter(x)
            given = self.inner(entered, ropes)
            for half in (0, 1):
                some = slice((seen + half) % 2, None, 2)
                read, y = entered[some].flatten(0, 1).double(), given[some].flatten(0, 1).double()
                grams[half] += read.T @ read
                crosses[half] += y.T @ read
            seen += len(x)
        return Moments(grams, crosses)

    def watch(self, x: Tensor) -> None:
        """Note what is told of this block beside its loss, on residual streams [B, T, H] that enter. Most kinds tell nothing."""

    def watched(self) -> dict[str, Any]:
        """What was noted since the last time, as JSON."""
        return {}


@torch.no_grad()
def statistics_of(part: Part, inputs: list[Tensor], channels: Callable[[Tensor], Tensor], width: int) -> Statistics:
    """Over the residual streams [B, T, H] that enter. channels: from the normed input to what the last matrix reads [B, T, width]."""
    device = inputs[0].device

    @torch.no_grad()
    def channel_gram() -> Tensor:
        total = torch.zeros(width, width, dtype=torch.float64, device=device)
        for x in inputs:
            read = channels(part.enter(x)).flatten(0, 1).double()
            total.addmm_(read.T, read)
        return total

    total = torch.zeros(width, dtype=torch.float64, device=device)
    found = Statistics(num_tokens=0, channel_sum=total, channel_gram=channel_gram)
    for x in inputs:
        read = channels(part.enter(x)).flatten(0, 1)
        found.num_tokens += len(read)
        found.channel_sum += read.double().abs().sum(dim=0)
    return found


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE (RoFormer, arXiv 2104.09864, in the rotate-half layout of Llama) to x [B, heads, T, D] with tables [T, R].

    With R < D the first R dimensions of a head turn, the rest stays (partial RoPE).
    """
    cos, sin = (table.to(x.dtype) for table in rope)
    if cos.shape[-1] < x.shape[-1]:
        turned = rotate(x[..., : cos.shape[-1]], rope)
        return torch.cat((turned, x[..., cos.shape[-1] :]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_mask(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """True where query i may see key j: i - window < j <= i. [T, T]"""
    i = torch.arange(num_tokens, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


def blank(sub_block: SubBlock, device: torch.device | str = "meta", in_training: bool = False) -> Part:
    """The module of `sub_block` with weights yet to be loaded. in_training: the one whose passes are few on a GPU."""
    with torch.device("meta"):
        part: Part = sub_block.module(in_training)
    return part if str(device) == "meta" else part.to_empty(device=device)


def learning(module: nn.Module) -> nn.Module:
    """All of it learns from now on, but for what no gradient reaches: the parameters that a module names in `fixed`."""
    module.requires_grad_(True)
    for one in module.modules():
        for name in getattr(one, "fixed", ()):
            getattr(one, name).requires_grad_(False)
    return module


# A stored tensor to where it runs, in this dtype; None: the model's.
Move = Callable[[Tensor, torch.dtype | None], Tensor]


def moving(device: torch.device | str, dtype: torch.dtype) -> Move:
    """To a device, for a model in `dtype`."""
    return lambda tensor, own: tensor.to(device, own or dtype)


def moved(sub_block: SubBlock, weights: Mapping[str, Tensor], move: Move) -> dict[str, Tensor]:
    """A sub-block's tensors where they run; those that are `exact` keep their own dtype."""
    return {n: move(t, t.dtype if n in sub_block.exact else None) for n, t in weights.items()}


def loaded(sub_block: SubBlock, weights: Mapping[str, Tensor], in_training: bool = False) -> Part:
    """The module of `sub_block`, sharing `weights` (all of them, by name inside the sub-block); nothing in it learns."""
    part = blank(sub_block, in_training=in_training)
    part.load_state_dict(dict(weights), assign=True)
    return part.requires_grad_(False).eval()
