"""DeciLM (model_type "nemotron-nas") for transformers: the decoder of modeling_puzzle.py, configured by `block_configs`.

A layer may have fewer KV heads, a narrower FFN, one matrix in place of either sub-block, or nothing. Weight names are
Llama's, with `self_attn.linear_attn.weight` and `mlp.linear_mlp.weight` for matrices; a sub-block that is left out has
no norm either. Windows: `layer_types[i] == "sliding_attention"` gives layer i the window `sliding_window`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from .configuration_decilm import DeciLMConfig
from .modeling_puzzle import PuzzleConfig, PuzzleForCausalLM


class DeciLMForCausalLM(PuzzleForCausalLM):
    """The decoder with a language-model head; forward and generate as in PuzzleForCausalLM."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig):
        super().__init__(config)
        if getattr(config, "linear_mlp", "linear_mlp") == "linear":  # the name that mlx-lm's reader has for the matrix
            for layer, block in zip(self.model.layers, config.block_configs, strict=True):
                if block.ffn.replace_with_linear:
                    matrix = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)
                    layer.mlp = nn.Sequential(OrderedDict(linear=matrix))
            self.post_init()

    @staticmethod
    def decoder_config(config: Any) -> PuzzleConfig:
        """`block_configs` in the words of `PuzzleConfig.per_layer_config`."""
        shared = (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "hidden_act",
            "rms_norm_eps", "max_position_embeddings", "mlp_bias", "tie_word_embeddings", "use_cache", "pad_token_id",
            "initializer_range",
        )  # fmt: skip
        layer_types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
        layers: dict[str, dict[str, Any]] = {}
        for index, block in enumerate(config.block_configs):
            entry: dict[str, Any] = {"skip": [], "linear": []}
            for owner, part in (("attention", block.attention), ("mlp", block.ffn)):
                if part.no_op or part.replace_with_linear:
                    entry["skip" if part.no_op else "linear"].append(owner)
            if not (block.attention.no_op or block.attention.replace_with_linear):
                entry["num_key_value_heads"] = config.num_attention_heads // block.attention.n_heads_in_group
                if layer_types[index] == "sliding_attention":
                    entry["sliding_window"] = config.sliding_window
            if not (block.ffn.no_op or block.ffn.replace_with_linear):
                entry["intermediate_size"] = config.width(index)
            layers[str(index)] = {key: value for key, value in entry.items() if value != []}
        qkv_bias = getattr(config, "qkv_bias", config.attention_bias)
        values: dict[str, Any] = {
            **{key: getattr(config, key) for key in shared},
            "attention_bias": config.attention_bias,
            "qkv_bias": qkv_bias and not config.attention_bias,
            "rope_parameters": dict(config.rope_parameters),
            "per_layer_config": layers,
        }
        return PuzzleConfig(**values)


DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
