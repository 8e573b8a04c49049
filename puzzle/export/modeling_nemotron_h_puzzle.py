"""Nemotron-H whose blocks differ (model_type "nemotron_h_puzzle") for transformers: the decoder of modeling_puzzle.py under
Nemotron-H's names, configured by `block_configs`. A block is a norm and a mixer: Mamba-2, attention without positions, squared
ReLUs, or experts of these beside a shared one.

Letters: N tokens, E hidden_size, K experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_nemotron_h_puzzle import NemotronHPuzzleConfig
from .modeling_puzzle import PuzzleConfig, PuzzleForCausalLM, PuzzleModel
from .modeling_puzzle_moe import PuzzleExpert, PuzzleMoE


class NemotronHPuzzleExperts(nn.ModuleList):
    """Routed experts, one by one as checkpoints have them. x [N, E], chosen and weights [N, K] -> [N, E]"""

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            given = self[expert](x[token]) * weights[token, place, None].to(x.dtype)
            out.index_add_(0, token, given.to(out.dtype))
        return out


class NemotronHPuzzleMoE(nn.Module):
    """[B, T, E] -> [B, T, E]"""

    def __init__(self, config: Any, made: PuzzleMoE):
        super().__init__()
        self.gate = made.gate
        self.shared_experts: Any = made.shared_expert
        self.fc1_latent_proj, self.fc2_latent_proj = made.fc1_latent_proj, made.fc2_latent_proj
        width, count, latent = config.moe_intermediate_size, config.num_experts, config.moe_latent_size
        self.experts = NemotronHPuzzleExperts(PuzzleExpert(config, width, latent) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        out = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(flat), *self.gate(flat)))
        return (out + self.shared_experts(flat)).view(x.shape)


class NemotronHPuzzleModel(PuzzleModel):
    """Its layers have one sub-block each, whose norm and module get the names of checkpoints."""

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.embeddings, self.norm_f = self._modules.pop("embed_tokens"), self._modules.pop("norm")
        layer: Any
        for layer, own in zip(self.layers, config.per_layer_config, strict=True):
            ((name, (norm, _)),) = layer.norms.items()
            layer.norm, mixer = layer._modules.pop(norm), layer._modules.pop(name)
            layer.mixer = NemotronHPuzzleMoE(own, mixer) if isinstance(mixer, PuzzleMoE) else mixer
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
            kind = block["block_type"]
            if kind not in ("mamba", "attention", "mlp", "moe"):
                raise ValueError(f"block_configs[{index}] = {block}: mamba, attention, mlp and moe are known")
            if kind == "moe":
                own |= {"num_experts": own.pop("n_routed_experts"), "router": "sigmoid", "correction_bias": True}
                own["shared_expert_intermediate_size"] = own.pop("moe_shared_expert_intermediate_size")
            skip = ["attention"] if kind in ("mlp", "moe") else ["mlp"]
            layers[str(index)] = own | {"skip": skip} | ({"mamba": mamba} if kind == "mamba" else {})
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
