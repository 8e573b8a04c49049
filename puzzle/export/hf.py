"""`--format hf`: a child as a Hugging Face checkpoint that `from_pretrained(..., trust_remote_code=True)` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puzzle.export.checkpoint import write_checkpoint
from puzzle.export.child import Child
from puzzle.parents.child import check_said, config_of


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
    """config.json of the child: the parent's values, our classes, and what single layers change. Raises UserError for what a config
    has no words for."""
    around, origins = child.around, child.layer_origins
    config = {
        "architectures": ["PuzzleForCausalLM"],
        "model_type": "puzzle",
        "auto_map": {
            "AutoConfig": "modeling_puzzle.PuzzleConfig",
            "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
        },
        **child.kept,
        "vocab_size": around.vocab_size,
        "hidden_size": around.hidden_size,
        "rms_norm_eps": around.norm_eps,
        "max_position_embeddings": around.max_length,
        "tie_word_embeddings": around.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "parent_name": child.parent_name,
        **config_of(child.structure, child.base),
        **({} if origins is None else {"layer_origins": origins}),
    }
    check_said(config, child.structure)
    return config
