"""The configuration of Nemotron-H whose blocks differ (model_type "nemotron_h_puzzle"): an entry of `block_configs` for each.

    {"block_type": "mamba"}    {"block_type": "mlp", "intermediate_size": 15680}
    {"block_type": "moe", "n_routed_experts": 96, "num_experts_per_tok": 4, "moe_intermediate_size": 1344, …}
    {"block_type": "attention", "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "sliding_window": 1024}

What an entry says stands in place of the global value of that name. Readers: vLLM, SGLang and TensorRT-LLM with their own model
code, transformers with modeling_nemotron_h_puzzle.py.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import NemotronHConfig


class NemotronHPuzzleConfig(NemotronHConfig):
    """NemotronHConfig, and what single blocks have of their own."""

    model_type = "nemotron_h_puzzle"

    block_configs: Any = None
    mtp_block_configs: Any = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.block_configs is not None and len(self.block_configs) != len(self.layers_block_type or ()):
            raise ValueError(
                f"block_configs has {len(self.block_configs)} entries for {len(self.layers_block_type or ())} blocks"
            )

    def get_nemotron_h_config_for_layer(self, index: int) -> NemotronHPuzzleConfig:
        """The configuration of one block, which engines build it from."""
        found = copy.copy(self)
        for name, value in self.block_configs[index].items():
            setattr(found, name, value)
        return found


NemotronHPuzzleConfig.register_for_auto_class()
