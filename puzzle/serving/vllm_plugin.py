"""The vLLM plug-in (entry-point group `vllm.general_plugins`): `vllm serve CHILD` on the `--format hf` export, as it stands.

vLLM calls `register` in each of its processes. From then on it reads config.json by `ServedConfig` and builds `vllm_model.py`,
both of which come with this package: no code of the checkpoint runs, with or without --trust-remote-code.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from puzzle.blocklib.gqa import Gqa
from puzzle.parents.child import child as read_child
from puzzle.parents.structure import Structure

# What single layers have of their own, by which vLLM must not judge all of them: it would cut every cache to a window, or stretch the
# context by a RoPE's factor (`max_position_embeddings` has it already).
OF_LAYERS = ("per_layer_config", "sliding_window", "rope", "ropes", "auto_map")


class ServedConfig(PreTrainedConfig):
    """A child's config.json as vLLM should see it. child: config.json itself, from which the layers are built."""

    model_type = "puzzle"
    child: Any = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises UserError for a child that is not understood."""
        return super().from_dict(seen_by_engine(config_dict.get("child") or config_dict), **kwargs)

    def structure(self) -> Structure:
        """Raises UserError for a value that is not config.json's any more: `--hf-overrides` would be half followed."""
        for name, value in seen_by_engine(self.child).items():
            if name in self.child and name not in CHANGED_BY_ENGINE and getattr(self, name, value) != value:
                raise ValueError(
                    f"{name} {getattr(self, name)} where config.json of the child says {value}: children take no hf-overrides; edit "
                    f"config.json"
                )
        return read_child(self.child)


CHANGED_BY_ENGINE = ("architectures", "dtype", "quantization_config", "tie_word_embeddings", "transformers_version")


def seen_by_engine(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json that hold for the whole model, and what vLLM derives from the others: the most KV heads of any layer,
    for what is sized once (each layer's cache is sized by its own)."""
    structure = read_child(config)
    attends = [sub_block for _, _, sub_block in structure if isinstance(sub_block, Gqa)]
    found = {name: value for name, value in config.items() if name not in OF_LAYERS}
    return found | {
        "num_key_value_heads": max([a.num_key_value_heads for a in attends] or [config["num_key_value_heads"]]),
        "max_position_embeddings": structure.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "child": config,
    }


def register() -> None:
    """Make children known to this process's transformers and vLLM. May be called again."""
    from vllm import ModelRegistry

    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    ModelRegistry.register_model("PuzzleForCausalLM", "puzzle.serving.vllm_model:PuzzleForCausalLM")
