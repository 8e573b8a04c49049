"""The frame of kinds with a recurrent state in plain PyTorch (`blocklib/recurrent.py`), around what each kind does with its state.

Letters: B batch, T tokens, H hidden_size, I inner channels, W conv_width.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from puzzle.blocklib.moments import Statistics
from puzzle.blocklib.plain.part import Part, Ropes, statistics_of
from puzzle.blocklib.recurrent import Recurrent

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class RecurrentMixer(Part):
    """A kind fills in `recurrence` and `step`, and gives the norm at the end: gate_norm(y [..., I] in float32 or wider, z [..., its
    channels]) -> [..., I] in z's dtype."""

    gate_norm: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, sizes: Recurrent, num_gates: int, num_rest: int, *, bias: bool = False, conv_bias: bool = False):
        """num_gates, num_rest: channels of z, and of what the recurrence reads beside the convolution."""
        super().__init__(sizes)
        self.sizes: Any = sizes
        convolved = sizes.conv_channels
        self.split = (num_gates, convolved, num_rest)
        self.in_proj = nn.Linear(sizes.hidden_size, sum(self.split), bias=bias)
        self.conv1d = nn.Conv1d(convolved, convolved, sizes.conv_width, groups=convolved, bias=conv_bias)

    def finish(self) -> None:
        sizes = self.sizes
        self.out_proj = nn.Linear(sizes.inner_size, sizes.hidden_size, bias=self.in_proj.bias is not None)
        super().finish()

    def recurrence(self, convolved: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Of whole sequences: convolved [B, T, channels] in float32 or wider, rest [B, T, …] -> y [B, T, I] and the state after the
        last token [B, …]"""
        raise NotImplementedError

    def step(self, convolved: Tensor, rest: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The same of one token of each sequence, after the state `hidden`. [B, channels], [B, …] -> [B, I], [B, …]"""
        raise NotImplementedError

    def mixed(self, projected: Tensor, state: RecurrentState | None = None) -> Tensor:
        """From what in_proj gives to what out_proj reads, of whole sequences; fills the state. [B, T, ...] -> [B, T, I]"""
        z, before, rest = projected.split(self.split, dim=-1)
        padded = F.pad(before.transpose(1, 2), (self.sizes.conv_width - 1, 0))  # [B, channels, W - 1 + T]
        convolved = wide(F.silu(self.conv1d(padded).transpose(1, 2)))
        with torch.autocast(projected.device.type, enabled=False):
            y, last = self.recurrence(convolved, rest)
        if state is not None:
            state.inputs.copy_(padded[:, :, padded.shape[2] - self.sizes.conv_width + 1 :])
            state.hidden.copy_(last)
        return self.gate_norm(y, z)

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.out_proj(self.mixed(self.in_proj(entered)))

    def stepped(self, projected: Tensor, state: RecurrentState) -> Tensor:
        """The same of one token of each sequence; the state moves on, in place. [B, ...] -> [B, I]"""
        z, new, rest = projected.split(self.split, dim=-1)
        inputs = torch.cat((state.inputs, new[:, :, None]), dim=-1)
        state.inputs.copy_(inputs[:, :, 1:])
        y, hidden = self.step(wide(F.silu(self.conv1d(inputs)[:, :, 0])), rest, wide(state.hidden))
        state.hidden.copy_(hidden)
        return self.gate_norm(y, z)

    def new_state(self, batch: int, max_length: int, like: Tensor) -> RecurrentState:
        return RecurrentState(self.sizes, batch, like)

    def prefill(self, x: Tensor, ropes: Ropes, state: RecurrentState) -> Tensor:
        return x + self.leave(self.out_proj(self.mixed(self.in_proj(self.enter(x)), state)))

    def decode(self, x: Tensor, ropes: Ropes, state: RecurrentState, position: int) -> Tensor:
        return x + self.leave(self.out_proj(self.stepped(self.in_proj(self.enter(x)[:, 0]), state))[:, None])

    @torch.no_grad()
    def calibrate(self, inputs: list[Tensor]) -> Statistics:
        return statistics_of(self, inputs, lambda entered: self.mixed(self.in_proj(entered)), self.out_proj.in_features)


class RecurrentState:
    """Of each sequence: the last inputs of the convolution [B, channels, W - 1], and the recurrent state [B, …]."""

    def __init__(self, sizes: Recurrent, batch: int, like: Tensor):
        self.inputs = like.new_zeros(batch, sizes.conv_channels, sizes.conv_width - 1)
        dtype = torch.float64 if like.dtype == torch.float64 else DTYPES[sizes.state_dtype]
        self.hidden = like.new_zeros(batch, *sizes.state_shape, dtype=dtype)

    def of(self, rows: slice) -> RecurrentState:
        """That of some of the sequences, sharing memory."""
        found = copy(self)
        found.inputs, found.hidden = self.inputs[rows], self.hidden[rows]
        return found

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.inputs, self.hidden))

    def randomize(self) -> None:
        """Fill with noise, to time a decode step without a prompt."""
        self.inputs.normal_()
        self.hidden.normal_()


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def in_chunks(step: Callable[..., tuple[Tensor, Tensor]], parts: tuple[Tensor, ...], hidden: Tensor, size: int) -> Any:
    """y of all tokens and the last state, from step(*parts of `size` tokens, state) -> (their y, the state after them). parts [B, T, …]

    Where gradients are kept, a backward pass computes each chunk again: together their scores would take too much memory.
    """
    if torch.is_grad_enabled():
        step = partial(checkpoint, step, use_reentrant=False, preserve_rng_state=False)
    found = []
    for chunk in zip(*(t.split(size, dim=1) for t in parts), strict=True):
        y, hidden = step(*chunk, hidden)
        found.append(y)
    return torch.cat(found, dim=1), hidden


def decays(logs: Tensor) -> tuple[Tensor, Tensor]:
    """From each token of a chunk to later ones [..., L, L], and of what the chunk began with [..., L], of logarithms of decays [..., L].

    Sums of logarithms are taken from each token on, never as differences of sums from the chunk's first: a small one after large ones
    would drown.
    """
    between = logs[..., None].expand(*logs.shape, logs.shape[-1]).tril(-1).cumsum(dim=-2).exp().tril()
    return between, logs.cumsum(-1).exp()
