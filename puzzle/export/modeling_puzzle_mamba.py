"""Mamba-2 (arXiv 2405.21060) in place of attention, for modeling_puzzle.py.

Letters: B batch, T new tokens, N num_heads, P head_dim, G num_groups, Z state_size, I = N · P.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_puzzle_recurrent import PuzzleRecurrent, decays


class PuzzleMamba(PuzzleRecurrent):
    """A chunk of tokens at a time."""

    word = "mamba"
    known = {  # noqa: RUF012
        "num_heads": None, "head_dim": None, "num_groups": None, "state_size": None, "conv_width": 4, "chunk_size": 128,
        "conv_bias": True, "bias": False, "state_dtype": "float32",
    }  # fmt: skip

    def lay_out(self) -> tuple[int, int]:
        sizes = self.sizes
        heads, self.groups, head_dim, state_size = (
            sizes[name] for name in ("num_heads", "num_groups", "head_dim", "state_size")
        )
        inner, shared = heads * head_dim, self.groups * state_size
        self.parts, self.split = (inner, shared, shared), (inner, inner + 2 * shared, heads)
        self.state_shape = (heads, head_dim, state_size)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(heads)) for _ in range(3))
        return inner, inner

    def recurrence(self, x: Tensor, rest: Tensor, real: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        dt = F.softplus(rest + self.dt_bias.float())  # [B, T, N]
        dt = dt if real is None else dt * real
        counts = (len(self.D), self.groups, self.groups)
        v, b, c = (t.unflatten(-1, (n, -1)) for t, n in zip(x.split(self.parts, -1), counts, strict=True))
        b, c = (t.repeat_interleave(len(self.D) // self.groups, dim=2) for t in (b, c))  # [B, T, N, Z]
        y, state = self.scan(v, dt, b, c, state)
        return (y + self.D.float()[:, None] * v).flatten(-2), state

    def scan(self, v: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """state = exp(-exp(A_log) dt) state + dt v ⊗ b; y = state · c. v [B, T, N, P], state [B, N, P, Z] -> y and the last state"""
        found, logs = [], -self.A_log.float().exp() * dt
        chunks = (t.transpose(1, 2).split(self.chunk, 2) for t in (v, dt, b, c, logs))
        for v_, dt_, b_, c_, logs_ in zip(*chunks, strict=True):
            (decay, since), values = decays(logs_), dt_[..., None] * v_
            found.append((c_ @ b_.transpose(2, 3) * decay) @ values + since * (c_ @ state.transpose(2, 3)))
            state = since[:, :, -1:] * state + (decay[:, :, -1, :, None] * values).transpose(2, 3) @ b_
        return torch.cat(found, dim=2).transpose(1, 2), state

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y * F.silu(z.float())).unflatten(-1, (self.groups, -1))
        return self.norm["weight"] * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(-2).to(
            z.dtype
        )
