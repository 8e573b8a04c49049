"""Gated DeltaNet (arXiv 2412.06464) in place of attention, for modeling_puzzle.py.

Letters: B batch, T new tokens, M num_key_heads, K key_dim, N num_value_heads, V value_dim, I = N · V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modeling_puzzle_recurrent import PuzzleRecurrent, decays


class PuzzleDelta(PuzzleRecurrent):
    """A chunk of tokens at a time."""

    word = "gated_delta"
    known = {  # noqa: RUF012
        "num_key_heads": None, "key_dim": None, "num_value_heads": None, "value_dim": None, "conv_width": 4, "chunk_size": 64,
        "gate": True, "state_dtype": "float32",
    }  # fmt: skip

    def lay_out(self) -> tuple[int, int]:
        keys, self.key_dim, values, self.value_dim = (
            self.sizes[name] for name in ("num_key_heads", "key_dim", "num_value_heads", "value_dim")
        )
        inner, self.shared = values * self.value_dim, values // keys
        self.parts = (keys * self.key_dim, keys * self.key_dim, inner)
        self.split = (inner if self.sizes["gate"] else 0, sum(self.parts), 2 * values)
        self.state_shape = (values, self.key_dim, self.value_dim)
        self.dt_bias, self.A_log = (nn.Parameter(torch.ones(values)) for _ in range(2))
        return inner, self.value_dim

    def recurrence(self, x: Tensor, rest: Tensor, real: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = x.split(self.parts, dim=-1)
        q, k = (t.unflatten(-1, (-1, self.key_dim)) for t in (q, k))
        q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        q, k = (t.repeat_interleave(self.shared, dim=2) for t in (q * self.key_dim**-0.5, k))  # [B, T, N, K]
        b, a = rest.chunk(2, dim=-1)
        beta, logs = b.sigmoid(), -self.A_log.float().exp() * F.softplus(a + self.dt_bias.float())  # [B, T, N]
        beta, logs = (beta, logs) if real is None else (beta * real, logs * real)
        found, v = [], v.unflatten(-1, (-1, self.value_dim))
        chunks = (t.transpose(1, 2).split(self.chunk, 2) for t in (q, k, v, beta, logs))
        for q_, k_, v_, beta_, logs_ in zip(*chunks, strict=True):
            decay, since = decays(logs_)
            system = beta_[..., None] * (k_ @ k_.transpose(2, 3)) * decay  # unit triangular: its diagonal counts as 1
            wanted = beta_[..., None] * (v_ - since * (k_ @ state))
            written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
            found.append((q_ @ k_.transpose(2, 3) * decay) @ written + since * (q_ @ state))
            state = since[:, :, -1:] * state + (decay[:, :, -1, :, None] * k_).transpose(2, 3) @ written
        return torch.cat(found, dim=2).transpose(1, 2).flatten(-2), state

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.unflatten(-1, (-1, self.value_dim))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        y = (self.norm["weight"] * y.to(z.dtype)).flatten(-2)
        return (y * F.silu(z.float())).to(z.dtype) if z.shape[-1] else y
