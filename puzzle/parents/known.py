"""Structures of well-known parents, to profile and to bench without their weights. Sources: their config.json on the hub."""

from __future__ import annotations

from typing import Any

from puzzle.base.errors import UserError, nearest
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.gpt_oss import gpt_oss
from puzzle.parents.nemotron_h import nemotron_h
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Structure


def _llama(
    layers: int, hidden: int, heads: int, kv: int, dim: int, width: int, vocab: int, *, norms: bool = False,
    tied: bool = False, length: int = 131072,
) -> Structure:  # fmt: skip
    """Layers that are all alike. norms: per head, on q and k."""
    attention = Gqa(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=dim,
        qk_norm="head" if norms else None,
        norm_eps=1e-5,
    )
    ffn = SwiGLU(hidden_size=hidden, intermediate_size=width, norm_eps=1e-5)
    rope = Rope(head_dim=dim, max_length=length, parameters={"rope_type": "default", "rope_theta": 500000.0})
    return Structure(
        hidden_size=hidden,
        vocab_size=vocab,
        max_length=length,
        tied=tied,
        norm_eps=1e-5,
        ropes={"default": rope},
        layers=tuple({"attention": attention, "ffn": ffn} for _ in range(layers)),
    )


def _nemotron(hidden: int, width: int, pattern: str, **changes: Any) -> Structure:
    """Nemotron-Nano v2, by the letters of its blocks. changes: of config.json, of later ones."""
    config = {
        "hidden_size": hidden, "intermediate_size": width, "vocab_size": 131072, "max_position_embeddings": 131072,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128,
        "use_conv_bias": True, "use_bias": False, "mlp_bias": False, "mamba_ssm_cache_dtype": "float32",
        "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "hybrid_override_pattern": pattern,
    }  # fmt: skip
    return nemotron_h(config | changes)


def _gpt_oss(layers: int, experts: int) -> Structure:
    yarn = {
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    return gpt_oss({
        "hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "attention_bias": True, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2), "num_local_experts": experts, "num_experts_per_tok": 4,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, **yarn},
    })  # fmt: skip


STRUCTURES = {
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.3-70b": _llama(80, 8192, 64, 8, 128, 28672, 128256),
    "llama-3.1-405b": _llama(126, 16384, 128, 8, 128, 53248, 128256),
    "qwen3-8b": _llama(36, 4096, 32, 8, 128, 12288, 151936, norms=True, length=40960),
    "smollm2-135m": _llama(30, 576, 9, 3, 64, 1536, 49152, tied=True, length=8192),
    "reference": _llama(16, 256, 8, 4, 32, 704, 4096, tied=True, length=1024),
}

_QWEN = _llama(48, 2048, 32, 4, 128, 6144, 151936, norms=True, length=40960)
_EXPERTS = Moe(hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True)
STRUCTURES["qwen3-30b-a3b"] = _QWEN.with_layers([{**layer, "ffn": _EXPERTS} for layer in _QWEN.layers])
STRUCTURES["nemotron-nano-9b-v2"] = _nemotron(4480, 15680, "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-")
STRUCTURES["nemotron-nano-12b-v2"] = _nemotron(
    5120, 20480, "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
)
STRUCTURES["nemotron-3-nano-30b-a3b"] = _nemotron(
    2688, 1856, "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", num_attention_heads=32, num_key_value_heads=2,
    mamba_num_heads=64, mamba_head_dim=64, n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712, routed_scaling_factor=2.5, n_group=1, topk_group=1, norm_topk_prob=True,
)  # fmt: skip
STRUCTURES["gpt-oss-20b"], STRUCTURES["gpt-oss-120b"] = _gpt_oss(24, 32), _gpt_oss(36, 128)
STRUCTURES["llama-3.1-405b-tp8"] = STRUCTURES["llama-3.1-405b"].share(8)  # what one GPU of eight holds


def known_structure(name: str) -> Structure:
    """Raises UserError for a name that is not listed."""
    if name not in STRUCTURES:
        raise UserError(f"`shapes` {name} is unknown: {nearest(name, sorted(STRUCTURES))}")
    return STRUCTURES[name]
