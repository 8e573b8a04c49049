"""Mamba-2 in plain PyTorch: whole sequences in chunks (arXiv 2405.21060, section 6), one token at a time by the recurrence.

Letters: B batch, T tokens, L chunk, H hidden_size, N num_heads, D head_dim, G num_groups, S state_size, I = N · D, W conv_width.
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

from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.plain.part import Part, Ropes, statistics_of
from puzzle.blocklib.sub_block import Statistics

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class GatedNorm(nn.Module):
    """The norm of y · silu(z), each group of I / G channels by itself, in float32."""

    def __init__(self, size: int, num_groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.num_groups, self.eps = num_groups, eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y [..., I] in float32 or wider, z [..., I] -> [..., I] in z's dtype"""
        gated = (y * F.silu(z.to(y.dtype))).unflatten(-1, (self.num_groups, -1))
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(z.dtype) * normed.flatten(-2).to(z.dtype)


class Mixer(Part):
    def __init__(self, sub_block: Mamba2):
        super().__init__(sub_block)
        sub_block.check_groups()
        self.sizes = sub_block
        inner, convolved, heads = sub_block.inner_size, sub_block.conv_channels, sub_block.num_heads
        self.split, self.shared = (inner, convolved, heads), sub_block.num_groups * sub_block.state_size
        self.in_proj = nn.Linear(sub_block.hidden_size, sum(self.split), bias=sub_block.bias)
        self.conv1d = nn.Conv1d(convolved, convolved, sub_block.conv_width, groups=convolved, bias=sub_block.conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        self.gate_norm = GatedNorm(inner, sub_block.num_groups, sub_block.norm_eps)
        self.out_proj = nn.Linear(inner, sub_block.hidden_size, bias=sub_block.bias)
        self.finish()

    def steps(self, dt: Tensor) -> Tensor:
        """From what in_proj gives to steps of time, in float32 or wider. [..., N]"""
        return F.softplus(wide(dt) + wide(self.dt_bias))

    def parts(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., N, D], B and C [..., G, S], in float32 or wider."""
        x, b, c = wide(F.silu(convolved)).split((self.split[0], self.shared, self.shared), dim=-1)
        groups = (self.sizes.num_groups, self.sizes.state_size)
        return x.unflatten(-1, (-1, self.sizes.head_dim)), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def mixed(self, projected: Tensor, state: MambaState | None = None) -> Tensor:
        """From what in_proj gives to what out_proj reads, of whole sequences; fills the state. [B, T, ...] -> [B, T, I]"""
        z, before, dt = projected.split(self.split, dim=-1)
        padded = F.pad(before.transpose(1, 2), (self.sizes.conv_width - 1, 0))  # [B, channels, W - 1 + T]
        x, b, c = self.parts(self.conv1d(padded).transpose(1, 2))
        with torch.autocast(projected.device.type, enabled=False):
            y, last = scan(x, self.steps(dt), -wide(self.A_log).exp(), b, c, self.sizes.chunk_size)
            y = y + wide(self.D)[:, None] * x
        if state is not None:
            state.inputs.copy_(padded[:, :, padded.shape[2] - self.sizes.conv_width + 1 :])
            state.hidden.copy_(last)
        return self.gate_norm(y.flatten(-2), z)

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.out_proj(self.mixed(self.in_proj(entered)))

    def stepped(self, projected: Tensor, state: MambaState) -> Tensor:
        """The same of one token of each sequence; the state moves on, in place. [B, ...] -> [B, I]"""
        z, new, dt = projected.split(self.split, dim=-1)
        inputs = torch.cat((state.inputs, new[:, :, None]), dim=-1)
        state.inputs.copy_(inputs[:, :, 1:])
        x, b, c = self.parts(self.conv1d(inputs)[:, :, 0])
        b, c = (t.repeat_interleave(self.sizes.num_heads // self.sizes.num_groups, dim=1) for t in (b, c))  # [B, N, S]
        dt = self.steps(dt)[..., None]
        decay = (-wide(self.A_log).exp()[:, None] * dt).exp()
        hidden = decay[..., None] * state.hidden + (dt * x)[..., None] * b[:, :, None]
        state.hidden.copy_(hidden)
        y = (hidden @ c[..., None])[..., 0] + wide(self.D)[:, None] * x
        return self.gate_norm(y.flatten(-2), z)

    def new_state(self, batch: int, max_length: int, like: Tensor) -> MambaState:
        return MambaState(self.sizes, batch, like)

    def prefill(self, x: Tensor, ropes: Ropes, state: MambaState) -> Tensor:
        return x + self.leave(self.out_proj(self.mixed(self.in_proj(self.enter(x)), state)))

    def decode(self, x: Tensor, ropes: Ropes, state: MambaState, position: int) -> Tensor:
        return x + self.leave(self.out_proj(self.stepped(self.in_proj(self.enter(x)[:, 0]), state))[:, None])

    @torch.no_grad()
    def calibrate(self, inputs: list[Tensor]) -> Statistics:
        return statistics_of(self, inputs, lambda entered: self.mixed(self.in_proj(entered)), self.out_proj)


class MambaState:
    """Of each sequence: the last inputs of the convolution [B, channels, W - 1], and the recurrent state [B, N, D, S]."""

    def __init__(self, sizes: Mamba2, batch: int, like: Tensor):
        self.inputs = like.new_zeros(batch, sizes.conv_channels, sizes.conv_width - 1)
        dtype = (
            torch.promote_types(DTYPES[sizes.state_dtype], like.dtype)
            if like.dtype == torch.float64
            else DTYPES[sizes.state_dtype]
        )
        self.hidden = like.new_zeros(batch, sizes.num_heads, sizes.head_dim, sizes.state_size, dtype=dtype)

    def of(self, rows: slice) -> MambaState:
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


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """y_t = h_t C_t with h_t = exp(a · dt_t) h_{t-1} + dt_t x_t ⊗ B_t, a chunk of tokens at a time; and the last h.

    x [B, T, N, D], dt [B, T, N], a [N] (negative), b and c [B, T, G, S] -> y [B, T, N, D], h [B, N, D, S]. Sums of logarithms of decays
    are taken from each token on, never as differences of sums from the chunk's first: a small one after large ones would drown.
    """
    h, found = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[3]), []
    step: Callable[..., Any] = _chunk
    if (
        torch.is_grad_enabled()
    ):  # a backward pass computes each chunk again: together their scores would take too much memory
        step = partial(checkpoint, _chunk, use_reentrant=False, preserve_rng_state=False)
    for parts in zip(*(t.split(chunk, dim=1) for t in (x, dt, a * dt, b, c)), strict=True):
        y, h = step(*parts, h)
        found.append(y)
    return torch.cat(found, dim=1), h


def _chunk(x: Tensor, dt: Tensor, logs: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """L tokens from the state h on: their y, and the state after them. logs [B, L, N]: of each token's decay."""
    length, shared = x.shape[1], x.shape[2] // b.shape[2]
    scores = torch.einsum("blgs,bmgs->bglm", c, b).repeat_interleave(shared, dim=1)  # [B, N, L, L]
    logs = logs.transpose(1, 2)  # [B, N, L]
    decay = (
        logs[..., None].expand(*logs.shape, length).tril(-1).cumsum(dim=-2).exp().tril()
    )  # from a token to later ones
    b, c = (t.repeat_interleave(shared, dim=2).transpose(1, 2) for t in (b, c))  # [B, N, L, S]
    values = (dt[..., None] * x).transpose(1, 2)  # [B, N, L, D]
    since = logs.cumsum(-1).exp()  # of what the chunk began with [B, N, L]
    y = (scores * decay) @ values + since[..., None] * (c @ h.transpose(2, 3))
    h = since[..., -1:, None] * h + (decay[:, :, -1, :, None] * values).transpose(2, 3) @ b
    return y.transpose(1, 2), h
