"""Gated DeltaNet in plain PyTorch: whole sequences in chunks (arXiv 2412.06464, section 3.3), one token at a time by the recurrence.

Letters: B batch, T tokens, L chunk, M num_key_heads, K key_dim, N num_value_heads, V value_dim, I = N · V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.plain.recurrent import RecurrentMixer, decays, in_chunks, wide

NORM_EPS = 1e-6  # of the length of q and k, as in transformers and flash-linear-attention


class HeadNorm(nn.Module):
    """The norm of each head's y, times silu(z) where there is a z."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y [..., I] in float32 or wider, z [..., I or 0] -> [..., I] in z's dtype"""
        heads = y.unflatten(-1, (-1, len(self.weight)))
        normed = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.eps)
        scaled = (self.weight.to(z.dtype) * normed.to(z.dtype)).flatten(-2)
        return (scaled * F.silu(z.to(y.dtype))).to(z.dtype) if z.shape[-1] else scaled


class DeltaMixer(RecurrentMixer):
    """What stands between the norm before and the stream; letters as of `GatedDelta`."""

    def __init__(self, sub_block: GatedDelta):
        super().__init__(sub_block, sub_block.inner_size if sub_block.gate else 0, 2 * sub_block.num_value_heads)
        self.dt_bias, self.A_log = (nn.Parameter(torch.ones(sub_block.num_value_heads)) for _ in range(2))
        self.gate_norm = HeadNorm(sub_block.value_dim, sub_block.norm_eps)
        self.finish()

    def parts(self, convolved: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k [..., N, K] of every value head, v [..., N, V], β and logarithms of decays [..., N]; in float32 or wider"""
        sizes = self.sizes
        q, k, v = convolved.split((sizes.keys_size, sizes.keys_size, sizes.inner_size), dim=-1)
        q, k = (t.unflatten(-1, (-1, sizes.key_dim)) for t in (q, k))
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + NORM_EPS) for t in (q, k))
        shared = sizes.num_value_heads // sizes.num_key_heads
        q, k = (t.repeat_interleave(shared, dim=-2) for t in (q, k))
        b, a = wide(rest).chunk(2, dim=-1)
        logs = -wide(self.A_log).exp() * F.softplus(a + wide(self.dt_bias))
        return q * sizes.key_dim**-0.5, k, v.unflatten(-1, (-1, sizes.value_dim)), b.sigmoid(), logs

    def recurrence(self, convolved: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        y, last = scan(*self.parts(convolved, rest), self.sizes.chunk_size)
        return y.flatten(-2), last

    def step(self, convolved: Tensor, rest: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, beta, logs = self.parts(convolved, rest)
        hidden = logs.exp()[..., None, None] * hidden
        new = beta[..., None] * (v - (k[..., None, :] @ hidden)[..., 0, :])
        hidden = hidden + k[..., None] * new[..., None, :]
        return (q[..., None, :] @ hidden)[..., 0, :].flatten(-2), hidden


def scan(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, logs: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """y_t = h_t q_t with h_t = (1 - β_t k_t ⊗ k_t) exp(logs_t) h_{t-1} + β_t k_t ⊗ v_t, a chunk of tokens at a time; and the last h.

    q, k [B, T, N, K], v [B, T, N, V], beta, logs (not positive) [B, T, N] -> y [B, T, N, V], h [B, N, K, V]
    """
    begin = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return in_chunks(_chunk, (q, k, v, beta, logs), begin, chunk)


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, logs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """L tokens from the state h on: their y, and the state after them. What each token writes is the solution of a triangular system:
    its value, less what the state and the tokens before it in the chunk give for its key, times β."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, N, L, …]
    beta = beta.transpose(1, 2)[..., None]
    between, since = decays(logs.transpose(1, 2))
    system = beta * (k @ k.transpose(2, 3)) * between  # its diagonal counts as 1
    wanted = beta * (v - since[..., None] * (k @ h))
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    y = (q @ k.transpose(2, 3) * between) @ written + since[..., None] * (q @ h)
    h = since[..., -1:, None] * h + (between[:, :, -1, :, None] * k).transpose(2, 3) @ written
    return y.transpose(1, 2), h
