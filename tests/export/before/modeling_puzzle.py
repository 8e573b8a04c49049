"""A Llama-like decoder whose layers may differ: fewer KV heads, narrower FFNs, windows, one matrix, or nothing at all.

`config.json` holds the values that most layers share and, in `per_layer_config`, what single layers change:

    {"3": {"num_key_value_heads": 2}, "4": {"skip": ["attention"]}, "6": {"linear": ["attention", "mlp"]},
     "7": {"skip": ["attention", "mlp"]}, "9": {"intermediate_size": 352, "sliding_window": 128}}

Every layer computes h = x + attention(input_layernorm(x)) and y = h + mlp(post_attention_layernorm(h)). A skipped
sub-block adds nothing and has no weights, not even its norm; a linear one is a single [E, E] matrix after its norm.
With `sliding_window` W the query at position i sees the keys i-W+1 … i. Weight names are Llama's.
Letters: B batch, T new tokens, S all tokens so far (cached ones included), E hidden_size, H heads, K kv heads,
D head_dim, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple


class PuzzleConfig(PreTrainedConfig):
    """Llama's values and its relatives'. Read what any layer changes from `per_layer_config[i]`: the whole raises."""

    model_type = "puzzle"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # default: num_attention_heads
    head_dim: Any = None  # default: hidden_size // num_attention_heads
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_parameters: Any = None  # {"rope_type": "default", "rope_theta": 10000.0, ...}
    sliding_window: int | None = None
    attention_bias: bool = False  # biases on q, k, v and o
    qkv_bias: bool = False  # biases on q, k and v alone (Qwen2)
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    linear: list[str] | None = None  # per layer only: the sub-blocks that are one matrix
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class PuzzleRMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x.float() * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, cos and sin [B, 1, T, D], to x [B, heads, T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def visible(num_new: int, num_past: int, window: int | None, real: Tensor | None, device: Any) -> Tensor | None:
    """True where a query may see a key. [T, S], or [B, 1, T, S] with padding; None: every key up to its own.

    real [B, S] is False at padding. Every query, padding too, sees itself: no row is empty. A query alone needs no
    mask for its window, since PuzzleAttention cuts the keys.
    """
    num_all = num_past + num_new
    if real is None and (num_new == 1 or (num_past == 0 and (window is None or window >= num_all))):
        return None
    query, key = torch.arange(num_past, num_all, device=device)[:, None], torch.arange(num_all, device=device)
    mask = key <= query if window is None else (key <= query) & (key > query - window)
    return mask if real is None else (mask & real[:, None, None]) | (key == query)


class PuzzleAttention(nn.Module):
    """Grouped-query softmax attention; keys and values live in the cache's slot number `slot`."""

    def __init__(self, config: Any, slot: int):
        super().__init__()
        size, dim, qkv_bias = config.hidden_size, config.head_dim, config.attention_bias or config.qkv_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.slot, self.window, self.head_dim, self.num_groups = slot, config.sliding_window, dim, heads // kv_heads
        self.q_proj = nn.Linear(size, heads * dim, bias=qkv_bias)
        self.k_proj = nn.Linear(size, kv_heads * dim, bias=qkv_bias)
        self.v_proj = nn.Linear(size, kv_heads * dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * dim, size, bias=config.attention_bias)
        self.q_norm = PuzzleRMSNorm(dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = PuzzleRMSNorm(dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: dict, cache: Cache | None) -> Tensor:
        """x [B, T, E], cos and sin [B, 1, T, D], masks {window: what `visible` returned} -> [B, T, E]"""
        mask, shape = masks[self.window], (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), cos, sin)  # [B, H, T, D]
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), cos, sin)  # [B, K, T, D]
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.slot)  # [B, K, S, D], or the end of it that the window needs
        if self.window is not None and x.shape[1] == 1:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        if mask is not None:  # the fast kernels take a mask or grouped heads, not both
            mask = mask[..., -k.shape[2] :]
            k, v = (t.repeat_interleave(self.num_groups, dim=1) for t in (k, v))
        causal = mask is None and x.shape[1] > 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(2))


class PuzzleMLP(nn.Module):
    """down(silu(gate(x)) · up(x)). [B, T, E] -> [B, T, E]"""

    def __init__(self, config: PuzzleConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def matrix(name: str, size: int) -> nn.Module:
    """A linear sub-block: one bias-free matrix called `name`. [B, T, E] -> [B, T, E]"""
    return nn.Sequential(OrderedDict({name: nn.Linear(size, size, bias=False)}))


class PuzzleLayer(GradientCheckpointingLayer):
    """One decoder layer. config: the layer's own, `per_layer_config[index]`; slot: its cache slot, if it attends."""

    def __init__(self, config: Any, index: int, slot: int):
        super().__init__()
        skip, linear, size = set(getattr(config, "skip", ())), set(config.linear or ()), config.hidden_size
        if not skip | linear <= {"attention", "mlp"} or skip & linear:
            raise ValueError(f"per_layer_config[{index}] has skip={sorted(skip)} and linear={sorted(linear)}: each may "
                             "name 'attention' and 'mlp', a sub-block in one of them only")  # fmt: skip
        self.attends, self.skip = "attention" not in skip | linear, skip
        if "attention" not in skip:
            self.input_layernorm = PuzzleRMSNorm(size, config.rms_norm_eps)
            self.self_attn = PuzzleAttention(config, slot) if self.attends else matrix("linear_attn", size)
        if "mlp" not in skip:
            self.post_attention_layernorm = PuzzleRMSNorm(size, config.rms_norm_eps)
            self.mlp = matrix("linear_mlp", size) if "mlp" in linear else PuzzleMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, masks: dict, past_key_values: Cache | None) -> Tensor:
        if self.attends:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, masks, past_key_values)
        elif "attention" not in self.skip:
            x = x + self.self_attn(self.input_layernorm(x))
        return x if "mlp" in self.skip else x + self.mlp(self.post_attention_layernorm(x))


class PuzzleModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: PuzzleConfig):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        if self.rope_type not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(f"rope_type '{self.rope_type}' is not supported: use default, linear, llama3 or yarn")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        self.windows: list[int | None] = []  # of each cache slot; slots number the layers that attend, without gaps
        for index, layer_config in enumerate(config.per_layer_config or [config] * config.num_hidden_layers):
            self.layers.append(PuzzleLayer(layer_config, index, slot=len(self.windows)))
            self.windows += [layer_config.sliding_window] if self.layers[-1].attends else []
        self.norm = PuzzleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rope: tuple[Tensor, float] | None = None  # made in forward: __init__ may run on the meta device

    def new_cache(self) -> DynamicCache:
        """One slot per layer that attends: slot 0 is asked for the number of tokens and must never stay empty."""
        cache = DynamicCache()
        cache.layers = [DynamicLayer() if w is None else DynamicSlidingWindowLayer(w) for w in self.windows]
        cache.layer_class_to_replicate = None
        return cache

    def adopt(self, cache: Cache) -> Cache:
        """Check a cache that was handed in; lay out an unused `DynamicCache(config=...)` as `new_cache` does."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: this model supports DynamicCache only")
        if cache.layers and not any(getattr(slot, "is_initialized", False) for slot in cache.layers):
            cache.layers = self.new_cache().layers
        return cache

    @torch.no_grad()
    def rope(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, computed in float32, of position_ids [B or 1, T]. [B or 1, 1, T, D] each"""
        device, dim = position_ids.device, self.config.head_dim
        if self._rope is None or self._rope[0].device != device:
            if self.rope_type == "default":
                exponent = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
                self._rope = 1.0 / self.config.rope_parameters["rope_theta"] ** exponent, 1.0
            else:
                self._rope = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, device)
        inv_freq, scaling = self._rope
        angles = (position_ids[:, None, :, None].float() * inv_freq).repeat(1, 1, 1, 2)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, use_cache: bool | None = None,
        output_hidden_states: bool | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """input_ids [B, T] or inputs_embeds [B, T, E], attention_mask [B, S] -> last_hidden_state [B, T, E]"""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = self.new_cache()
        num_past = 0 if past_key_values is None else self.adopt(past_key_values).get_seq_length()
        num_new, num_all, real = x.shape[1], num_past + x.shape[1], None
        if attention_mask is not None and self.windows:
            if attention_mask.shape != (x.shape[0], num_all):
                raise ValueError(f"attention_mask has shape {list(attention_mask.shape)} instead of "
                                 f"{[x.shape[0], num_all]}: one entry per cached and new token")  # fmt: skip
            real = None if attention_mask.all() else attention_mask.bool()
        if position_ids is None:
            position_ids = torch.arange(num_all, device=x.device)[None] if real is None else real.cumsum(-1) - 1
            position_ids = position_ids[:, num_past:].clamp(min=0)
        cos, sin = self.rope(position_ids, x.dtype)
        masks = {window: visible(num_new, num_past, window, real, x.device) for window in set(self.windows)}

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            hidden_states += (x,) if wanted else ()
            x = layer(x, cos, sin, masks, past_key_values=past_key_values)
        x = self.norm(x)
        return BaseModelOutputWithPast(x, past_key_values, hidden_states=(*hidden_states, x) if wanted else None)


class PuzzleForCausalLM(PreTrainedModel, GenerationMixin):
    """PuzzleModel with a language-model head."""

    config_class: Any = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = {"PuzzleLayer"}  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = PuzzleModel(self.decoder_config(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def decoder_config(config: Any) -> PuzzleConfig:
        """The decoder's own configuration; formats that say the same in other words translate here."""
        return config

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """As PuzzleModel; logits [B, T, V], or of the last `logits_to_keep` tokens; labels [B, T] for the loss."""
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(out.last_hidden_state[:, keep]), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, out.past_key_values, out.hidden_states)

    def get_decoder(self) -> PuzzleModel:
        return self.model

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """Give `generate` a cache laid out for this model, without short slots where it will take tokens back."""
        if (kind := generation_config.cache_implementation) not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f"cache_implementation='{kind}' is not supported by this model: leave it out")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            full = kind == "dynamic_full" or generation_config.is_assistant or generation_mode == "assisted_generation"
            model_kwargs["past_key_values"] = DynamicCache() if full else self.model.new_cache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)  # type: ignore


PuzzleConfig.register_for_auto_class()
PuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
