"""Tiny parents of every family that we know, of transformers' own classes: random weights, odd sizes, several layouts.

    from tiny_parents import PARENTS, write_tiny_parent

A new family is a file in puzzle/parents/, and a row here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 384,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING, FULL = "sliding_attention", "full_attention"
SHORT, LONG = [1.0, 1.1, 1.2], [1.0, 4.0, 9.0]


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """changes: to SIZES. engines: those whose formats have words for all of it. ffn: variants for the road."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=lambda: rope("default"))
    engines: tuple[str, ...] = ()
    ffn: str = "0.5,linear,none"


ALL = ("vllm", "sglang", "tensorrt-llm", "llama.cpp", "mlx")
NATURAL = {"head_dim": 6}  # hidden_size / num_attention_heads, which some engines want
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
STEPS = {"time_step_min": 1e-30}  # at which transformers' PyTorch path holds steps of time, and nothing else does
LONGROPE = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32}
PARENTS = {
    "llama": Tiny(model_type="llama", changes=rope("default") | NATURAL, engines=ALL),
    "llama tied, with biases": Tiny(
        model_type="llama",
        changes=rope("default") | NATURAL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        engines=("vllm", "llama.cpp", "mlx"),
    ),
    "llama, llama3 rope": Tiny(model_type="llama", changes=rope("llama3", **LLAMA3) | NATURAL, engines=ALL),
    "llama, linear rope": Tiny(model_type="llama", changes=rope("linear", factor=3.0) | NATURAL, engines=ALL),
    "llama, yarn rope": Tiny(model_type="llama", changes=rope("yarn", **YARN) | NATURAL, engines=ALL),
    "llama, dynamic rope": Tiny(model_type="llama", changes=rope("dynamic", factor=2.0)),
    "llama, longrope": Tiny(
        model_type="llama", changes=rope("longrope", **LONGROPE | {"short_factor": [*SHORT, 1.3, 1.4], "long_factor": [*LONG, 16.0, 25.0]})
    ),
    "mistral": Tiny(model_type="mistral", changes=rope("default") | {"sliding_window": 7} | NATURAL, engines=("vllm",)),
    "qwen2": Tiny(model_type="qwen2", changes=rope("default") | NATURAL, engines=("vllm", "llama.cpp", "mlx", "sglang")),
    "qwen2, windows above": Tiny(
        model_type="qwen2",
        changes=rope("default") | NATURAL | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        engines=("vllm",),
    ),
    "qwen3": Tiny(model_type="qwen3"),
    "qwen3, windows by layer": Tiny(
        model_type="qwen3",
        changes=rope("default") | {"use_sliding_window": True, "sliding_window": 7, "layer_types": [FULL, SLIDING, SLIDING, FULL]},
    ),
    "qwen3_moe": Tiny(
        model_type="qwen3_moe",
        changes=rope("default")
        | {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True, "mlp_only_layers": [2]},
        ffn="experts=4,topk=2-width=16,dense=24,merged=0.5,linear,none",
    ),
    "qwen3_moe, every other layer": Tiny(
        model_type="qwen3_moe",
        changes=rope("default")
        | {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "decoder_sparse_step": 2, "sliding_window": 7, "use_sliding_window": True},
        ffn="0.5,frequent=3-topk=1,none",
    ),
    "granitemoehybrid, attention alone": Tiny(
        model_type="granitemoehybrid",
        changes=rope("default")
        | NATURAL
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.21, "residual_multiplier": 0.6, "logits_scaling": 2.5}
        | {"num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 28, "position_embedding_type": "rope"}
        | {"layer_types": ["attention"] * 4, "mamba_n_heads": 6, "mamba_d_head": 12},
        ffn="experts=3-topk=1,shared=16,dense=24,linear,none",
    ),
    "granitemoehybrid, Mamba-2 and dense FFNs": Tiny(
        model_type="granitemoehybrid",
        changes=rope("default")
        | NATURAL
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.21, "residual_multiplier": 0.6, "logits_scaling": 2.5}
        | {"num_local_experts": 0, "shared_intermediate_size": 52, "position_embedding_type": "nope", "mamba_chunk_size": 8}
        | {"layer_types": ["mamba", "attention", "mamba", "mamba"], "mamba_n_heads": 6, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 9},
    ),
    "gpt_oss": Tiny(
        model_type="gpt_oss",
        changes=rope("yarn", **YARN, truncate=False)
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7, "intermediate_size": 20},
        ffn="experts=4,topk=2-width=16,merged=0.5,linear,none",
    ),
    "phi3": Tiny(model_type="phi3", changes=rope("default") | NATURAL, engines=ALL),
    "phi3, partial longrope": Tiny(
        model_type="phi3",
        changes=rope("longrope", **LONGROPE, partial_rotary_factor=0.6)
        | {"hidden_size": 60, "original_max_position_embeddings": 32, "partial_rotary_factor": 0.6, "sliding_window": 9},
    ),
    "gemma3": Tiny(
        model_type="gemma3_text",
        changes={
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
            "sliding_window": 7,
            "query_pre_attn_scalar": 7,
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": Tiny(model_type="olmo2"),
    "olmo3": Tiny(
        model_type="olmo3",
        changes={
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
            "sliding_window": 7,
            "rope_parameters": {FULL: rope("yarn", **YARN)["rope_parameters"], SLIDING: PLAIN},
        },
    ),
    "exaone4": Tiny(
        model_type="exaone4",
        changes=rope("default") | {"layer_types": [SLIDING, FULL, SLIDING, FULL], "sliding_window": 7},
    ),
    "exaone4 without windows": Tiny(model_type="exaone4", changes=rope("default") | {"layer_types": [FULL] * 4, "sliding_window": None}),
    "seed_oss": Tiny(model_type="seed_oss", changes=rope("default") | NATURAL, engines=("vllm", "sglang", "llama.cpp", "mlx")),
    "granite": Tiny(
        model_type="granite",
        changes=rope("default")
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.21, "residual_multiplier": 0.6, "logits_scaling": 2.5},
    ),
    "smollm3": Tiny(model_type="smollm3", changes=rope("default") | {"no_rope_layers": [1, 0, 1, 0]}),
    "nemotron_h": Tiny(
        model_type="nemotron_h",
        engines=("llama.cpp",),
        changes={
            "hybrid_override_pattern": "M-*M-M",
            "num_hidden_layers": 6,
            "mamba_num_heads": 6,
            "mamba_head_dim": 7,
            "n_groups": 3,
            "ssm_state_size": 11,
            "chunk_size": 8,
            **STEPS,
        },
    ),
    "nemotron_h with biases, attention first": Tiny(
        model_type="nemotron_h",
        changes={
            "layers_block_type": ["full_attention", "linear_attention", "mlp", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 9,
            "n_groups": 1,
            "ssm_state_size": 5,
            "conv_kernel": 3,
            "use_bias": True,
            "mlp_bias": True,
            "use_conv_bias": False,
            **STEPS,
        },
    ),
    "nemotron_h with experts": Tiny(
        model_type="nemotron_h",
        engines=("llama.cpp",),
        changes={
            "hybrid_override_pattern": "ME*EM",
            "num_hidden_layers": 5,
            "mamba_num_heads": 4,
            "mamba_head_dim": 7,
            "n_groups": 2,
            "ssm_state_size": 9,
            "n_routed_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 28,
            "routed_scaling_factor": 2.5,
            **STEPS,
        },
        ffn="experts=4,topk=2-width=16,shared=16,dense=24,linear,none",
    ),
    "nemotron_h with latent experts": Tiny(
        model_type="nemotron_h",
        engines=("llama.cpp",),
        changes={
            "hybrid_override_pattern": "ME*E",
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 7,
            "n_groups": 2,
            "ssm_state_size": 9,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "moe_shared_expert_intermediate_size": 28,
            "moe_latent_size": 20,
            **STEPS,
        },
        ffn="experts=4,width=16,merged=3,dense=24,linear,none",
    ),
    "nemotron_h with groups of experts, and FFNs": Tiny(
        model_type="nemotron_h",
        changes={
            "layers_block_type": ["moe", "linear_attention", "full_attention", "mlp", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 7,
            "n_groups": 2,
            "ssm_state_size": 9,
            "n_routed_experts": 12,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 17,
            **STEPS,
        },
        ffn="0.5,frequent=8-topk=1,dense=1.0,none",
    ),
    "smollm3 with windows": Tiny(
        model_type="smollm3",
        changes=rope("default")
        | {"no_rope_layers": [1, 1, 0, 1], "use_sliding_window": True, "sliding_window": 7, "layer_types": [SLIDING, FULL, FULL, SLIDING]},
    ),
}  # fmt: skip


def write_tiny_parent(name: str, out: Path, **sizes: Any) -> Path:
    """One of PARENTS as transformers saves it, without a tokenizer. sizes: other values of its config."""
    made = PARENTS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(made.model_type, **SIZES | made.changes | sizes))
    offset = made.model_type == "gemma3_text"  # whose norms scale by 1 + weight
    for key, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        if "norm" in key or key.endswith((".D", "A_log")):
            weight.data = 0.2 * noise + (0 if offset else 1)
        else:
            weight.data = noise * (
                1.0
                if key.endswith("sinks")
                else 0.1
                if weight.dim() == 1
                else 0.4
                if "embed" in key or "conv1d" in key
                else weight.shape[-1] ** -0.5
            )
            weight.data = 2 * noise - 5 if key.endswith("dt_bias") else weight.data  # steps of time from 1e-5 to 0.3
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    model.tie_weights()
    model.save_pretrained(out)
    return out
