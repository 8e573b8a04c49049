"""`--format hf`: a child as a Hugging Face checkpoint that `from_pretrained(..., trust_remote_code=True)` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puzzle.export.checkpoint import write_checkpoint
from puzzle.export.child import Child

_KEPT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "hidden_act",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
)


def write_hf(child: Child, out: Path, card: str, **options: Any) -> None:
    """Write the child as it stands. options: `extra_json`, `code`, `max_shard_bytes` and `force` of `write_checkpoint`."""
    write_checkpoint(
        out,
        config=hf_config(child, child.dtype),
        tensors=child.tensors(),
        tokenizer_from=child.tokenizer,
        generation_config=child.generation_config,
        card=card,
        **options,
    )


def hf_config(child: Child, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the child: the parent's values, our classes, and what single layers change."""
    kept = {key: child.parent_config[key] for key in _KEPT if key in child.parent_config}
    origins = child.layer_origins
    return {
        "architectures": ["PuzzleForCausalLM"],
        "model_type": "puzzle",
        "auto_map": {
            "AutoConfig": "modeling_puzzle.PuzzleConfig",
            "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
        },
        **kept,
        "num_hidden_layers": len(child.layers),
        "num_key_value_heads": child.num_key_value_heads,
        "head_dim": child.head_dim,
        "rope_parameters": child.rope_parameters,
        "attention_bias": child.o_bias,
        "qkv_bias": child.qkv_bias and not child.o_bias,
        "mlp_bias": child.mlp_bias,
        "qk_norm": child.qk_norm,
        "sliding_window": child.window,
        "dtype": str(dtype).removeprefix("torch."),
        "parent_name": child.parent_name,
        "per_layer_config": child.per_layer_config(),
        **({} if origins is None else {"layer_origins": origins}),
    }
