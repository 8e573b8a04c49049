"""A Llama-like decoder whose layers may differ: fewer KV heads, narrower FFNs, windows, one matrix, or nothing at all.

`config.json` holds the values that most layers share and, in `per_layer_config`, what single layers change:

    {"3": {"num_key_value_heads": 2}, "4": {"skip": ["attention"]}, "5": {"intermediate_size": 352, "sliding_window": 128},
     "6": {"linear": ["attention", "mlp"]}, "7": {"skip": ["attention", "mlp"]}}

Every layer computes h = x + attention(input_layernorm(x)) and y = h + mlp(post_attention_layernorm(h)). A skipped
sub-block adds nothing and has no weights, not even its norm; a linear one is a single [hidden, hidden] matrix. With
`sliding_window` W the query at position i sees the keys i-W+1 … i. Weight names are Llama's.

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

SUB_BLOCKS = {"attention", "mlp"}


class PuzzleConfig(PreTrainedConfig):
    """Llama's configuration, the biases and head norms of its relatives, and the standard `per_layer_config`.

    A value that some layer changes is read from `config.per_layer_config[i]`: transformers refuses to read it from
    the config as a whole.
    """

    model_type = "puzzle"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # default: num_attention_heads
    head_dim: int | None = None  # default: hidden_size // num_attention_heads
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None  # {"rope_type": "default", "rope_theta": 10000.0, ...}
    sliding_window: int | None = None
    attention_bias: bool = False  # biases on q, k, v and o
    qkv_bias: bool = False  # biases on q, k and v alone (Qwen2)
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)
    linear: list[str] | None = None  # per layer: sub-blocks that are one matrix
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class PuzzleRMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, cos and sin [B, 1, T, D], to x [B, heads, T, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def visible(num_new: int, num_past: int, window: int | None, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """True where a query may see a key. [B or 1, 1, T, S]; None where every query sees all keys up to its own.

    padding [B, S] is True at real tokens. A query always sees itself, so that no row is empty: what padding computes
    is never read.
    """
    num_all = num_past + num_new
    if window is not None and window >= num_all:
        window = None
    if padding is None and (num_new == 1 or (window is None and num_past == 0)):
        return None  # with one query, PuzzleAttention itself cuts the keys to the window
    query = torch.arange(num_past, num_all, device=device)[:, None]
    key = torch.arange(num_all, device=device)[None, :]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    if padding is not None:
        mask = (mask & padding[:, None, None, :]) | (key == query)
    return mask.expand(-1, 1, -1, -1) if mask.dim() == 4 else mask[None, None]


class PuzzleAttention(nn.Module):
    """Grouped-query softmax attention; keys and values are kept in the cache's slot number `slot`."""

    def __init__(self, config: PuzzleConfig, slot: int):
        super().__init__()
        self.slot, self.window, self.head_dim = slot, config.sliding_window, config.head_dim
        self.num_groups, rest = divmod(config.num_attention_heads, config.num_key_value_heads)
        if rest:
            raise ValueError(
                f"num_attention_heads ({config.num_attention_heads}) is no multiple of num_key_value_heads "
                f"({config.num_key_value_heads})"
            )
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        qkv_bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = PuzzleRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = PuzzleRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """x [B, T, E], cos and sin [B, 1, T, D], mask as `visible` makes it -> [B, T, E]"""
        num_new = x.shape[1]
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), cos, sin)  # [B, H, T, D]
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), cos, sin)  # [B, K, T, D]
        v = self.v_proj(x).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.slot)  # [B, K, S, D], or the end of it that the window needs
        if self.window is not None and num_new == 1:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        if mask is not None:  # the fast kernels take a mask or grouped heads, not both
            mask = mask[..., -k.shape[2] :]
            k, v = (t.repeat_interleave(self.num_groups, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and num_new > 1, enable_gqa=k.shape[1] != q.shape[1]
        )
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


class PuzzleLayer(GradientCheckpointingLayer):
    """One decoder layer, built from its own entry of `per_layer_config`. slot: its cache slot if it attends."""

    def __init__(self, config: PuzzleConfig, index: int, slot: int):
        super().__init__()
        skip, linear, size = set(getattr(config, "skip", ())), set(config.linear or ()), config.hidden_size
        if not skip | linear <= SUB_BLOCKS or skip & linear:
            raise ValueError(
                f"per_layer_config[{index}] has skip={sorted(skip)} and linear={sorted(linear)}: each may name "
                "'attention' and 'mlp', and no sub-block can be in both"
            )

        def matrix(name: str) -> nn.Module:
            return nn.Sequential(OrderedDict({name: nn.Linear(size, size, bias=False)}))

        self.attends = not {"attention"} & (skip | linear)
        if "attention" not in skip:
            self.input_layernorm = PuzzleRMSNorm(size, config.rms_norm_eps)
            self.self_attn = PuzzleAttention(config, slot) if self.attends else matrix("linear_attn")
        if "mlp" not in skip:
            self.post_attention_layernorm = PuzzleRMSNorm(size, config.rms_norm_eps)
            self.mlp = matrix("linear_mlp") if "mlp" in linear else PuzzleMLP(config)
        self.skip = skip

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past_key_values: Cache | None = None
    ) -> Tensor:
        if self.attends:
            x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, past_key_values)
        elif "attention" not in self.skip:
            x = x + self.self_attn(self.input_layernorm(x))
        if "mlp" not in self.skip:
            x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class PuzzlePreTrainedModel(PreTrainedModel):
    config_class = PuzzleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["PuzzleLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True


class PuzzleModel(PuzzlePreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.rope_type = config.rope_parameters["rope_type"]
        if self.rope_type not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(f"rope_type '{self.rope_type}' is not supported: use default, linear, llama3 or yarn")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        self.windows: list[int | None] = []  # of each cache slot; slots number the layers that attend, without gaps
        for index in range(config.num_hidden_layers):
            layer = PuzzleLayer(config.per_layer_config[index], index, slot=len(self.windows))
            self.layers.append(layer)
            if layer.attends:
                self.windows.append(layer.self_attn.window)
        self.norm = PuzzleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rope: tuple[Tensor, float] | None = None  # made in forward: __init__ may run on the meta device
        self.gradient_checkpointing = False
        self.post_init()

    def arrange(self, cache: Cache) -> Cache:
        """Give an unused cache one slot per layer that attends, a short one where the layer has a window.

        transformers lays out one slot per layer instead, and asks slot 0 for the number of cached tokens, which is
        wrong when the first layer does not attend.
        """
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}: this model supports DynamicCache only")
        found = [getattr(slot, "sliding_window", None) for slot in cache.layers]
        if found != self.windows and not any(slot.is_initialized for slot in cache.layers):
            cache.layer_class_to_replicate = None
            cache.layers = [DynamicLayer() if w is None else DynamicSlidingWindowLayer(w) for w in self.windows]
        return cache

    @torch.no_grad()
    def rope(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, computed in float32, of position_ids [B or 1, T]. [B or 1, 1, T, D] each"""
        device = position_ids.device
        if self._rope is None or self._rope[0].device != device:
            if self.rope_type == "default":
                exponent = torch.arange(0, self.config.head_dim, 2, dtype=torch.float, device=device) / self.config.head_dim
                self._rope = 1.0 / self.config.rope_parameters["rope_theta"] ** exponent, 1.0
            else:
                self._rope = ROPE_INIT_FUNCTIONS[self.rope_type](self.config, device)
        inv_freq, scaling = self._rope
        angles = position_ids[:, None, :, None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, E], attention_mask [B, S] -> last_hidden_state [B, T, E]"""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        num_new, num_past = x.shape[1], 0
        if past_key_values is not None:
            num_past = self.arrange(past_key_values).get_seq_length()
        padding = None
        if attention_mask is not None and self.windows:
            if attention_mask.shape != (x.shape[0], num_past + num_new):
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, not {[x.shape[0], num_past + num_new]}: one "
                    "entry per cached and new token"
                )
            padding = None if attention_mask.all() else attention_mask.bool()
        if position_ids is None and padding is not None:
            position_ids = (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -num_new:]
        elif position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_new, device=x.device)[None]
        cos, sin = self.rope(position_ids, x.dtype)
        masks = {window: visible(num_new, num_past, window, padding, x.device) for window in set(self.windows)}

        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            mask = masks[layer.self_attn.window] if layer.attends else None
            x = layer(x, cos, sin, mask, past_key_values=past_key_values)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )


class PuzzleForCausalLM(PuzzlePreTrainedModel, GenerationMixin):
    """PuzzleModel with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PuzzleConfig):
        super().__init__(config)
        self.model = PuzzleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As PuzzleModel; logits [B, T, V], or of the last `logits_to_keep` tokens; labels [B, T] for the loss."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict[str, Any], *args, **kwargs):
        """Give `generate` a cache laid out for this model (see `PuzzleModel.arrange`)."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation='{generation_config.cache_implementation}': this model supports 'dynamic' only"
            )
        if generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = self.model.arrange(DynamicCache())
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache


PuzzleConfig.register_for_auto_class()
PuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
