"""The sub-blocks as modules. Each owns its norm and returns its contribution to the residual stream.

Letters: B batch, T tokens, H hidden_size, N num_attention_heads, K num_key_value_heads, D head_dim,
F intermediate_size. Every forward takes x [B, T, H] and the RoPE tables (cos, sin) [T, D], returns [B, T, H].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.layer import LayerSpec

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 as Llama does (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight.float(), self.eps)
        normed = F.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply RoPE to x [B, heads, T, D] with tables [T, D]."""
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def causal_mask(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """True where query i may see key j: i - window < j <= i. [T, T]"""
    i = torch.arange(num_tokens, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


class Attention(nn.Module):
    """Grouped-query softmax attention, causal, optionally over a sliding window."""

    def __init__(self, spec: LayerSpec, num_key_value_heads: int, window: int | None = None):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_attention_heads, num_key_value_heads, spec.head_dim
        self.window = window
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        q_size, kv_size = self.num_heads * self.head_dim, num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=spec.o_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps) if spec.qk_norm else nn.Identity()

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Normed, projected and rotated q [B, N, T, D], k and v [B, K, T, D]."""
        x = self.norm(x)
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), rope)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), rope)
        return q, k, self.v_proj(x).view(shape).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of T new queries over the same T keys. [B, T, H]"""
        num_tokens = q.shape[2]
        if self.window is None or self.window >= num_tokens:
            shared = self.num_heads != self.num_kv_heads
            return self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared))
        mask = causal_mask(num_tokens, self.window, q.device)
        # With a mask, only equally many heads of q and k spare a GPU the scores [B, N, T, T] in float32.
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
        return self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def output(self, attended: Tensor) -> Tensor:
        """[B, N, T, D] -> [B, T, H]"""
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        return self.attend(*self.project(x, rope))


class SwiGLU(nn.Module):
    """down(silu(gate(n)) · up(n)) of the normed input n (arXiv 2002.05202)."""

    def __init__(self, spec: LayerSpec, width: int):
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.gate_proj = nn.Linear(spec.hidden_size, width, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden_size, width, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(width, spec.hidden_size, bias=spec.mlp_bias)

    def inner(self, normed: Tensor) -> Tensor:
        """The activation that down_proj reads. [B, T, F]"""
        return F.silu(self.gate_proj(normed)) * self.up_proj(normed)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        return self.down_proj(self.inner(self.norm(x)))


class Linear(nn.Module):
    """One H × H matrix after the norm: the cheapest stand-in that still mixes channels."""

    def __init__(self, spec: LayerSpec):
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.linear = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        return self.linear(self.norm(x))


class NoOp(nn.Module):
    """Contributes nothing and owns nothing, not even a norm."""

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        return torch.zeros_like(x)
