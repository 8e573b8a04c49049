"""`--format hf`: a child as a Hugging Face checkpoint that `from_pretrained(..., trust_remote_code=True)` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puzzle.assemble import Choice, child_tensors, open_parent, read_architecture
from puzzle.card import child_card
from puzzle.export.checkpoint import write_checkpoint
from puzzle.families.family import HfModel
from puzzle.files import claim_output
from puzzle.library import KINDS, Library

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


def per_layer_config(library: Library, layers: list[Choice]) -> dict[str, dict[str, Any]]:
    """The standard field: only layers that differ, lists of both sub-blocks joined."""
    entries: dict[str, dict[str, Any]] = {}
    for index, choice in enumerate(layers):
        entry: dict[str, Any] = {}
        for kind in KINDS:
            for key, value in library.variant(kind, choice[kind])["hf"].items():
                entry[key] = entry.get(key, []) + value if isinstance(value, list) else value
        if entry:
            entries[str(index)] = entry
    return entries


def child_config(parent: HfModel, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """config.json of the child: the parent's values, our classes, and what single layers change."""
    from transformers import LlamaConfig

    config, spec = parent.config, parent.spec
    rope = LlamaConfig(
        **{
            k: config[k]
            for k in (
                "rope_theta",
                "rope_scaling",
                "rope_parameters",
                "hidden_size",
                "num_attention_heads",
                "max_position_embeddings",
            )
            if config.get(k) is not None
        }
    ).rope_parameters
    return {
        "architectures": ["PuzzleForCausalLM"],
        "model_type": "puzzle",
        "auto_map": {
            "AutoConfig": "modeling_puzzle.PuzzleConfig",
            "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
        },
        **{key: config[key] for key in _KEPT if key in config},
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "rope_parameters": dict(rope or {}),
        "attention_bias": spec.o_bias,
        "qkv_bias": spec.qkv_bias and not spec.o_bias,
        "mlp_bias": spec.mlp_bias,
        "qk_norm": spec.qk_norm,
        "sliding_window": spec.window,
        "dtype": str(parent.final_norm().dtype).removeprefix("torch."),
        "per_layer_config": entries,
    }


def export_child(
    root: Path,
    architecture: Path,
    out: Path,
    *,
    parent: str | None = None,
    force: bool = False,
    max_shard_bytes: int = 4 * 2**30,
) -> Path:
    """Write the child of `architecture` to `out`, tensor by tensor. Returns `out`; raises UserError for bad input."""
    library = Library.open(root)
    solved = read_architecture(architecture, library)
    opened = open_parent(library, parent)
    claim_output(out, force)
    entries = per_layer_config(library, solved["layers"])
    generation = opened.directory / "generation_config.json"
    import json

    write_checkpoint(
        out,
        config=child_config(opened, entries),
        tensors=child_tensors(library, solved["layers"], opened),
        tokenizer_from=opened.directory,
        generation_config=json.loads(generation.read_text()) if generation.is_file() else None,
        card=child_card(library, solved),
        extra_json={"architecture.json": {"schema": 1, **{k: v for k, v in solved.items() if k != "schema"}}},
        max_shard_bytes=max_shard_bytes,
        force=force,
    )
    return out
