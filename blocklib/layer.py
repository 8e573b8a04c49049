"""What blocklib knows of a parent layer: plain shapes, plain weights, and calibration statistics.

Letters: H hidden_size, N num_attention_heads, K num_key_value_heads, D head_dim, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["attention", "ffn"]
KINDS: tuple[Kind, Kind] = ("attention", "ffn")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """Shapes of one decoder layer: pre-norm attention and pre-norm SwiGLU FFN, each added to the residual stream."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    inv_freq: tuple[float, ...]  # [D/2] RoPE frequencies, as transformers computes them for the parent
    rope_scaling: float = 1.0  # factor on cos and sin (YaRN); 1 elsewhere
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm per head on q and k (Qwen3)
    window: int | None = None  # sliding window of the parent's attention, in tokens


@dataclass(kw_only=True, slots=True)
class Calibration:
    """Statistics of the parent FFN over calibration tokens, summed in float64 (see initialize.py).

    channel_sum [F]: Σ|x_i| of the FFN's intermediate activation; gram [H, H]: Σ n nᵀ of the normed input n;
    cross [H, H]: Σ y nᵀ with y the FFN's output.
    """

    num_tokens: int
    channel_sum: Tensor
    gram: Tensor
    cross: Tensor


@dataclass(kw_only=True, slots=True)
class ParentLayer:
    """One parent layer: weights by their name inside the sub-block ("norm.weight", "q_proj.weight", ...)."""

    index: int
    spec: LayerSpec
    attention: dict[str, Tensor]
    ffn: dict[str, Tensor]
    calibration: Calibration | None = field(default=None)

    def weights(self, kind: Kind) -> dict[str, Tensor]:
        return self.attention if kind == "attention" else self.ffn


def attention_shapes(spec: LayerSpec, num_key_value_heads: int | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a softmax-attention sub-block, its norm included."""
    hidden, heads, dim = spec.hidden_size, spec.num_attention_heads, spec.head_dim
    kv = num_key_value_heads or spec.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {
        "norm.weight": (hidden,),
        "q_proj.weight": (heads * dim, hidden),
        "k_proj.weight": (kv * dim, hidden),
        "v_proj.weight": (kv * dim, hidden),
        "o_proj.weight": (hidden, heads * dim),
    }
    if spec.qkv_bias:
        shapes |= {"q_proj.bias": (heads * dim,), "k_proj.bias": (kv * dim,), "v_proj.bias": (kv * dim,)}
    if spec.o_bias:
        shapes["o_proj.bias"] = (hidden,)
    if spec.qk_norm:
        shapes |= {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
    return shapes


def ffn_shapes(spec: LayerSpec, width: int | None = None) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a SwiGLU sub-block of `width` channels, its norm included."""
    hidden, inner = spec.hidden_size, width or spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "norm.weight": (hidden,),
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
    }
    if spec.mlp_bias:
        shapes |= {"gate_proj.bias": (inner,), "up_proj.bias": (inner,), "down_proj.bias": (hidden,)}
    return shapes


def rope_tables(spec: LayerSpec, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0…length-1. [length, D] float32 each

    Source: RoFormer (arXiv 2104.09864), in the rotate-half layout of Llama checkpoints.
    """
    inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * spec.rope_scaling, angles.sin() * spec.rope_scaling
