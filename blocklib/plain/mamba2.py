"""Mamba-2 in plain PyTorch: whole sequences in chunks (arXiv 2405.21060, section 6), one token at a time by the recurrence.

Letters: B batch, T tokens, L chunk, H hidden_size, N num_heads, D head_dim, G num_groups, S state_size, I = N · D, W conv_width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.plain.recurrent import RecurrentMixer, decays, in_chunks, wide


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


class Mixer(RecurrentMixer):
    def __init__(self, sub_block: Mamba2):
        sub_block.check_groups()
        inner, heads = sub_block.inner_size, sub_block.num_heads
        super().__init__(sub_block, inner, heads, bias=sub_block.bias, conv_bias=sub_block.conv_bias)
        self.shared = sub_block.num_groups * sub_block.state_size
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        self.gate_norm = GatedNorm(inner, sub_block.num_groups, sub_block.norm_eps)
        self.finish()

    def steps(self, dt: Tensor) -> Tensor:
        """From what in_proj gives to steps of time, in float32 or wider. [..., N]"""
        return F.softplus(wide(dt) + wide(self.dt_bias))

    def parts(self, convolved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., N, D], B and C [..., G, S]"""
        x, b, c = convolved.split((self.sizes.inner_size, self.shared, self.shared), dim=-1)
        groups = (self.sizes.num_groups, self.sizes.state_size)
        return x.unflatten(-1, (-1, self.sizes.head_dim)), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def recurrence(self, convolved: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        x, b, c = self.parts(convolved)
        y, last = scan(x, self.steps(rest), -wide(self.A_log).exp(), b, c, self.sizes.chunk_size)
        return (y + wide(self.D)[:, None] * x).flatten(-2), last

    def step(self, convolved: Tensor, rest: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x, b, c = self.parts(convolved)
        b, c = (t.repeat_interleave(self.sizes.num_heads // self.sizes.num_groups, dim=1) for t in (b, c))  # [B, N, S]
        dt = self.steps(rest)[..., None]
        decay = (-wide(self.A_log).exp()[:, None] * dt).exp()
        hidden = decay[..., None] * hidden + (dt * x)[..., None] * b[:, :, None]
        return ((hidden @ c[..., None])[..., 0] + wide(self.D)[:, None] * x).flatten(-2), hidden


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """y_t = h_t C_t with h_t = exp(a · dt_t) h_{t-1} + dt_t x_t ⊗ B_t, a chunk of tokens at a time; and the last h.

    x [B, T, N, D], dt [B, T, N], a [N] (negative), b and c [B, T, G, S] -> y [B, T, N, D], h [B, N, D, S]
    """
    return in_chunks(_chunk, (x, dt, a * dt, b, c), x.new_zeros(x.shape[0], *x.shape[2:], b.shape[3]), chunk)


def _chunk(x: Tensor, dt: Tensor, logs: Tensor, b: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """L tokens from the state h on: their y, and the state after them. logs [B, L, N]: of each token's decay."""
    shared = x.shape[2] // b.shape[2]
    scores = torch.einsum("blgs,bmgs->bglm", c, b).repeat_interleave(shared, dim=1)  # [B, N, L, L]
    decay, since = decays(logs.transpose(1, 2))
    b, c = (t.repeat_interleave(shared, dim=2).transpose(1, 2) for t in (b, c))  # [B, N, L, S]
    values = (dt[..., None] * x).transpose(1, 2)  # [B, N, L, D]
    y = (scores * decay) @ values + since[..., None] * (c @ h.transpose(2, 3))
    h = since[..., -1:, None] * h + (decay[:, :, -1, :, None] * values).transpose(2, 3) @ b
    return y.transpose(1, 2), h
