"""Nemotron-H whose blocks differ (model_type "nemotron_h_puzzle") for transformers: the decoder of modeling_puzzle.py under
Nemotron-H's names, configured by `block_configs`. A block is a norm and a mixer: Mamba-2, attention without positions, or
squared ReLUs."""

from __future__ import annotations

from typing import Any

from torch import nn

from .configuration_nemotron_h_puzzle import NemotronHPuzzleConfig
from .modeling_puzzle import PuzzleConfig, PuzzleForCausalLM, PuzzleModel


class NemotronHPuzzleModel(PuzzleModel):
    """Its layers have one sub-block each, whose norm and module get the names of checkpoints."""

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.embeddings, self.norm_f = self._modules.pop("embed_tokens"), self._modules.pop("norm")
        layer: Any
        for layer in self.layers:
            ((name, (norm, _)),) = layer.norms.items()
            layer.norm, layer.mixer = layer._modules.pop(norm), layer._modules.pop(name)
            layer.norms = {"mixer": ("norm", None)}

    @property
    def embed_tokens(self) -> Any:  # type: ignore[override]
        return self.embeddings

    @embed_tokens.setter
    def embed_tokens(self, module: nn.Module) -> None:
        self.embeddings = module

    @property
    def norm(self) -> Any:  # type: ignore[override]
        return self.norm_f


class NemotronHPuzzleForCausalLM(PuzzleForCausalLM):
    """The decoder with a language-model head; forward and generate as in PuzzleForCausalLM."""

    config_class = NemotronHPuzzleConfig
    decoder_class = NemotronHPuzzleModel
    _tied_weights_keys = {}  # noqa: RUF012

    @staticmethod
    def decoder_config(config: Any) -> PuzzleConfig:
        """`block_configs` in the words of `PuzzleConfig.per_layer_config`."""
        mamba = {
            "num_heads": config.mamba_num_heads, "head_dim": config.mamba_head_dim, "num_groups": config.n_groups,
            "state_size": config.ssm_state_size, "conv_width": config.conv_kernel, "chunk_size": config.chunk_size,
            "conv_bias": config.use_conv_bias, "bias": config.use_bias,
            "state_dtype": config.mamba_ssm_cache_dtype,
        }  # fmt: skip
        layers: dict[str, dict[str, Any]] = {}
        for index, block in enumerate(config.block_configs):
            own = {name: value for name, value in block.items() if name != "block_type"}
            if block["block_type"] not in ("mamba", "attention", "mlp"):
                raise ValueError(
                    f"block_configs[{index}] is of type '{block['block_type']}': mamba, attention and mlp are known"
                )
            skip = ["attention"] if block["block_type"] == "mlp" else ["mlp"]
            layers[str(index)] = own | {"skip": skip} | ({"mamba": mamba} if block["block_type"] == "mamba" else {})
        shared = (
            "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
            "max_position_embeddings", "mlp_bias", "use_cache", "pad_token_id", "initializer_range",
        )  # fmt: skip
        values: dict[str, Any] = {
            **{key: getattr(config, key) for key in shared},
            "num_hidden_layers": len(layers),
            "hidden_act": config.mlp_hidden_act,
            "rms_norm_eps": config.layer_norm_epsilon,
            "rope": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "per_layer_config": layers,
        }
        return PuzzleConfig(**values)


NemotronHPuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
