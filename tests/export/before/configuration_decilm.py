"""The configuration of a DeciLM decoder (model_type "nemotron-nas"): Llama's values and a `block_configs` entry per layer.

    {"attention": {"n_heads_in_group": 4, "no_op": false, "replace_with_linear": false, ...},
     "ffn": {"ffn_mult": 2.625, "no_op": false, "replace_with_linear": false, ...}}

A layer has num_attention_heads // n_heads_in_group KV heads. Its FFN is int(2 · ffn_mult · hidden_size / 3) wide, rounded
up to a multiple of 256, or exactly `intermediate_size` wide when the entry has that key in place of `ffn_mult`.
Works with transformers 4 and 5 and needs nothing else, so that engines can read it with their own model code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig


class DeciLMConfig(PretrainedConfig):
    """`block_configs[i].attention` and `.ffn` have attributes; `rope_parameters` joins rope_theta and rope_scaling."""

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        block_configs: list[dict[str, Any]] | None = None,
        vocab_size: int = 128256,
        hidden_size: int = 8192,
        intermediate_size: None = None,  # per layer
        num_hidden_layers: int | None = None,
        num_attention_heads: int = 64,
        num_key_value_heads: None = None,  # per layer
        head_dim: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 131072,
        rope_theta: float = 500000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**entry[part]) for part in ("attention", "ffn")})
            for entry in block_configs or []
        ]
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = len(self.block_configs) if num_hidden_layers is None else num_hidden_layers
        if self.num_hidden_layers != len(self.block_configs):
            raise ValueError(f"block_configs has {len(self.block_configs)} entries for {num_hidden_layers} layers")
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        joined = dict(rope_parameters or rope_scaling or {})
        joined.setdefault("rope_type", joined.pop("type", "default"))
        joined.setdefault("rope_theta", rope_theta)
        self.rope_theta = joined["rope_theta"]
        self.rope_parameters = joined
        if not hasattr(type(self), "rope_scaling"):  # transformers 4; from 5 on it is another name of rope_parameters
            self.rope_scaling = self.scaling()
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        shared: dict[str, Any] = {
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "tie_word_embeddings": tie_word_embeddings,
        }
        super().__init__(**shared, **kwargs)

    def scaling(self) -> dict[str, Any] | None:
        """`rope_scaling` as config.json has it: no theta, None where nothing is scaled."""
        if self.rope_parameters["rope_type"] == "default":
            return None
        return {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}

    def width(self, index: int) -> int:
        """FFN channels of a layer that has a SwiGLU."""
        ffn = self.block_configs[index].ffn
        if not hasattr(ffn, "ffn_mult"):
            return ffn.intermediate_size
        return -(-int(2 * ffn.ffn_mult * self.hidden_size / 3) // 256) * 256

    def to_dict(self) -> dict[str, Any]:
        """As in config.json: plain entries in `block_configs`, `rope_theta` and `rope_scaling`."""
        values = super().to_dict()
        values.pop("rope_parameters", None)
        values["rope_scaling"] = self.scaling()
        values["block_configs"] = [
            {part: dict(vars(getattr(block, part))) for part in ("attention", "ffn")} for block in self.block_configs
        ]
        return values


DeciLMConfig.register_for_auto_class()
