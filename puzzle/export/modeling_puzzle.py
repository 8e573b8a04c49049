"""A Llama-like decoder whose layers may differ: fewer KV heads, narrower FFNs or experts, windows, one matrix, or nothing at all.

`config.json` holds the values that most layers share and, in `per_layer_config`, what single layers change:

    {"3": {"num_key_value_heads": 2}, "4": {"skip": ["attention"]}, "6": {"linear": ["attention", "mlp"]},
     "7": {"skip": ["attention", "mlp"]}, "9": {"intermediate_size": 352, "sliding_window": 128},
     "11": {"num_experts": 24, "num_experts_per_tok": 2}, "12": {"dense": ["mlp"], "intermediate_size": 96}}

A layer with `mamba`, {"num_heads": 128, "head_dim": 80, …}, has Mamba-2 in place of attention, one with `gated_delta` Gated DeltaNet, and
keeps a state for it.
Every layer computes h = x + attention(norm(x)) and y = h + mlp(norm(h)), with norms after in place of these, or both, by
`norm_placement`. A skipped sub-block adds nothing and has no weights, not even its norm; a linear one is a single [E, E]
matrix in its place, or the product of [E, R] and [R, E] with `linear_rank`, {"mlp": R}. With `num_experts` an mlp is a mixture of them (`modeling_puzzle_moe.py`) unless it is dense. With `sliding_window` W the query at position i sees the keys i-W+1 … i; `rope` names its rotary
positions, null for none. Weight names are Llama's, OLMo-2's (norms after) or Gemma-3's (both).
Runs in transformers 5.14 to 5.24; a forward takes no keyword that it does not know, so that a newer name is an error.
Letters: B batch, T new tokens, S all tokens so far (cached ones included), E hidden_size, H heads, K kv heads,
D head_dim, R rotary dimensions of a head, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import can_return_tuple

from .modeling_puzzle_delta import PuzzleDelta
from .modeling_puzzle_mamba import PuzzleMamba
from .modeling_puzzle_masks import attend, sequence_starts, visible
from .modeling_puzzle_moe import PuzzleMoE
from .modeling_puzzle_recurrent import PuzzleRecurrent, PuzzleState

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
MODULES = {"attention": "self_attn", "mlp": "mlp"}  # what a sub-block is called in config.json, and in the weights
RECURRENT = {
    kind.word: kind for kind in (PuzzleMamba, PuzzleDelta)
}  # in place of attention, and what it is called there too
NORMS = {  # by placement: the names of the norms before and after attention, and before and after the FFN
    "before": (("input_layernorm", None), ("post_attention_layernorm", None)),
    "after": ((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm")),
    "both": (
        ("input_layernorm", "post_attention_layernorm"), ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    ),
}  # fmt: skip
CACHE_NAMES = ("past_key_values", "cache")  # one thing: transformers 5.24 renamed the first to the second
CACHE_NAME = CACHE_NAMES["cache" in BaseModelOutputWithPast.__dataclass_fields__]  # of the transformers that runs this


class PuzzleConfig(PreTrainedConfig):
    """Llama's values and its relatives'. Read what any layer changes from `per_layer_config[i]`: the whole raises."""

    model_type = "puzzle"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(CACHE_NAMES)

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
    rope_parameters: Any = None  # {"rope_type": "default", "rope_theta": 10000.0, ...}: of the one called "default"
    ropes: Any = None  # {name: rope_parameters}, all of them, where layers have several
    rope: str | None = "default"  # which of them; None: no positions
    sliding_window: int | None = None
    attention_bias: bool = False  # biases on q, k, v and o
    qkv_bias: bool = False  # biases on q, k and v alone (Qwen2)
    mlp_bias: bool = False
    qk_norm: Any = False  # True: RMSNorm over each head of q and k (Qwen3); "all": over all heads together (OLMo-2)
    attention_sinks: bool = False  # a logit of every head joins its softmax (gpt-oss)
    norm_placement: str = "before"  # of the norms of sub-blocks: before, after or both
    norm_offset: bool = False  # the scale of every norm is 1 + weight (Gemma)
    attention_multiplier: float | None = None  # scale of the scores; default: 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0  # of what a sub-block adds
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0  # the logits are divided by it
    num_experts: int = 0  # of the mixture in place of an mlp; 0: none
    num_experts_per_tok: int = 1
    moe_intermediate_size: int | None = None
    moe_bias: bool = False  # on the router and on all matrices of experts
    norm_topk_prob: bool = False  # the weights of a token's experts are divided by their sum
    router: str = "softmax"  # or sigmoid, with the next three
    correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    shared_expert_intermediate_size: int | None = None  # of one more expert, which every token has
    shared_expert_gate: bool = False
    moe_latent_size: int | None = None  # channels that experts read and give, between two matrices
    dense: list[str] | None = None  # per layer only: ["mlp"] where it is of intermediate_size, whatever num_experts
    linear: list[str] | None = None  # per layer only: the sub-blocks that are one matrix
    linear_rank: Any = None  # per layer only: {sub-block: R} of those that are the product of two matrices
    mamba: Any = None  # per layer only: sizes of Mamba-2 in place of attention
    gated_delta: Any = None  # per layer only: sizes of Gated DeltaNet in place of attention
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
    """x / rms(x) · weight over the last dimension, computed in float32; with `norm_offset` · (1 + weight)."""

    def __init__(self, size: int, config: Any):
        super().__init__()
        self.weight, self.eps, self.offset = nn.Parameter(torch.ones(size)), config.rms_norm_eps, config.norm_offset

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (x.float() * scale * (1 + self.weight.float())).to(x.dtype)
        return self.weight * (x.float() * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions, cos and sin [B, 1, T, R], to the first R dimensions of x [B, heads, T, D]."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class Rope:
    """One set of rotary positions. switches_at: of longrope, sequences of more tokens have other frequencies at every position."""

    def __init__(self, config: PuzzleConfig, parameters: dict[str, Any]):
        self.kind, self.switches_at = parameters["rope_type"], None
        if self.kind not in ROPE_TYPES:
            raise ValueError(f"rope_type '{self.kind}' is not supported: {', '.join(ROPE_TYPES)} are")
        if self.kind == "longrope":
            self.switches_at = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        self.config = copy.copy(config)
        self.config.rope_parameters = dict(parameters)
        self.known: dict[Any, tuple[Tensor, float]] = {}  # filled in forward: __init__ may run on the meta device

    def frequencies(self, length: int, device: torch.device) -> tuple[Tensor, float]:
        """[R/2] in float32 of sequences of `length` tokens, and the factor on cos and sin."""
        if self.kind == "dynamic" and length > self.config.max_position_embeddings:
            raise ValueError(f"rope_type 'dynamic' beyond {self.config.max_position_embeddings} tokens ({length} came) "
                             "turns old keys anew with every token: not supported")  # fmt: skip
        key = (self.switches_at is not None and length > self.switches_at, device)
        if key not in self.known:
            if self.kind in ("default", "dynamic"):  # dynamic is the default up to the trained length
                p, dim = self.config.rope_parameters, self.config.head_dim
                dim = int(dim * (p.get("partial_rotary_factor") or 1.0))
                exponent = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
                self.known[key] = 1.0 / p["rope_theta"] ** exponent, 1.0
            else:
                self.known[key] = ROPE_INIT_FUNCTIONS[self.kind](self.config, device, seq_len=length)
        return self.known[key]

    @torch.no_grad()
    def tables(self, positions: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, computed in float32, of positions [B or 1, T] in sequences of lengths [B or 1, T or 1]. [B or 1, 1, T, R]"""
        longest = int(lengths.max()) if self.kind in ("dynamic", "longrope") else 1
        inv_freq, scaling = self.frequencies(longest, positions.device)
        if self.switches_at is not None:
            short, _ = self.frequencies(1, positions.device)
            inv_freq = torch.where(lengths[:, None, :, None] > self.switches_at, inv_freq, short)
        angles = (positions[:, None, :, None].float() * inv_freq).repeat(1, 1, 1, 2)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


class PuzzleAttention(nn.Module):
    """Grouped-query softmax attention; keys and values live in the cache's slot number `slot`."""

    def __init__(self, config: Any, slot: int):
        super().__init__()
        size, dim, qkv_bias = config.hidden_size, config.head_dim, config.attention_bias or config.qkv_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.slot, self.window, self.head_dim = slot, config.sliding_window, dim
        self.q_proj = nn.Linear(size, heads * dim, bias=qkv_bias)
        self.k_proj = nn.Linear(size, kv_heads * dim, bias=qkv_bias)
        self.v_proj = nn.Linear(size, kv_heads * dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * dim, size, bias=config.attention_bias)
        if config.qk_norm not in (False, None, True, "all"):
            raise ValueError(f'qk_norm {config.qk_norm!r} is not understood: true, "all" and false are')
        self.rope, self.scale, self.norm_all = config.rope, config.attention_multiplier, config.qk_norm == "all"
        sizes = (heads * dim, kv_heads * dim) if self.norm_all else (dim, dim)
        self.q_norm = PuzzleRMSNorm(sizes[0], config) if config.qk_norm else nn.Identity()
        self.k_norm = PuzzleRMSNorm(sizes[1], config) if config.qk_norm else nn.Identity()
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.attention_sinks else None

    def heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Normed. [B, T, heads · D] -> [B, heads, T, D]"""
        x = norm(x) if self.norm_all else x
        x = x.view(*x.shape[:2], -1, self.head_dim)
        return (x if self.norm_all else norm(x)).transpose(1, 2)

    def forward(self, x: Tensor, ropes: dict, masks: dict, cache: Cache | None) -> Tensor:
        """x [B, T, E], ropes {name: cos and sin [B or 1, 1, T, R]}, masks {window: what `visible` returned} -> [B, T, E]"""
        mask, turn = masks[self.window], ropes[self.rope]
        q, k = self.heads(self.q_proj(x), self.q_norm), self.heads(self.k_proj(x), self.k_norm)  # [B, H or K, T, D]
        v = self.v_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k = (q, k) if turn is None else (rotate(q, *turn), rotate(k, *turn))
        if cache is not None:
            k, v = cache.update(k, v, self.slot)  # [B, K, S, D], or the end of it that the window needs
        if self.window is not None and x.shape[1] == 1:
            k, v = k[:, :, -self.window :], v[:, :, -self.window :]
        out = attend(q, k, v, mask, self.scale, self.sinks)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class PuzzleMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), or down(relu2(up(x))). [B, T, E] -> [B, T, E]"""

    def __init__(self, config: PuzzleConfig):
        super().__init__()
        self.gated = config.hidden_act != "relu2"
        if self.gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(
            self.act(self.gate_proj(x)) * self.up_proj(x) if self.gated else self.act(self.up_proj(x))
        )


def matrix(name: str, size: int, rank: int | None) -> nn.Module:
    """A linear sub-block: one bias-free matrix called `name`, or with a rank v and then u in its place. [B, T, E] -> [B, T, E]"""
    if rank is None:
        return nn.Sequential(OrderedDict({name: nn.Linear(size, size, bias=False)}))
    factors = {"v": nn.Linear(size, rank, bias=False), "u": nn.Linear(rank, size, bias=False)}
    return nn.Sequential(OrderedDict({name: nn.Sequential(OrderedDict(factors))}))


class PuzzleLayer(GradientCheckpointingLayer):
    """One decoder layer. config: the layer's own, `per_layer_config[index]`; slot: its cache slot, if it attends."""

    def __init__(self, config: Any, index: int, slot: int):
        super().__init__()
        skip, linear, size = set(getattr(config, "skip", ())), set(config.linear or ()), config.hidden_size
        recurrent = {word: sizes for word in RECURRENT if (sizes := getattr(config, word)) is not None}
        mixers = len(recurrent) + ("attention" in skip | linear)
        if not skip | linear <= {"attention", "mlp"} or skip & linear or mixers > 1:
            raise ValueError(f"per_layer_config[{index}] has skip={sorted(skip)}, linear={sorted(linear)}, {recurrent}: "
                             "lists may name 'attention' and 'mlp', and a sub-block is one thing only")  # fmt: skip
        ranks = config.linear_rank or {}
        if not set(ranks) <= linear:
            raise ValueError(f"per_layer_config[{index}] has linear_rank={ranks} beside linear={sorted(linear)}: "
                             "what has a rank is linear")  # fmt: skip
        if config.dense not in (None, [], ["mlp"]):
            raise ValueError(f"per_layer_config[{index}] has dense={config.dense}: it may name 'mlp' alone")
        self.attends, self.recurs = not mixers, bool(recurrent)
        self.residual = config.residual_multiplier
        self.norms: dict[str, tuple[str | None, str | None]] = {}  # {sub-block: names of its norms}
        for (owner, name), norms in zip(MODULES.items(), NORMS[config.norm_placement], strict=True):
            if owner in skip:
                continue
            word = next(iter(recurrent), None) if owner == "attention" else None
            mixes, name = (PuzzleAttention, name) if word is None else (RECURRENT[word], word)
            self.norms[name] = before, after = norms
            if before is not None:
                self.add_module(before, PuzzleRMSNorm(size, config))
            if owner in linear:
                called = "linear_attn" if owner == "attention" else "linear_mlp"
                self.add_module(name, matrix(called, size, ranks.get(owner)))
            else:
                mlp = PuzzleMoE if config.num_experts and not config.dense else PuzzleMLP
                self.add_module(name, mixes(config, slot) if owner == "attention" else mlp(config))
            if after is not None:
                self.add_module(after, PuzzleRMSNorm(size, config))

    def forward(self, x: Tensor, ropes: dict, masks: dict, cache: Cache | None) -> Tensor:
        for name, (before, after) in self.norms.items():
            module = getattr(self, name)
            more = (ropes, masks, cache) if isinstance(module, PuzzleAttention | PuzzleRecurrent) else ()
            y = module(x if before is None else getattr(self, before)(x), *more)
            y = y if after is None else getattr(self, after)(y)
            x = x + (y if self.residual == 1 else y * self.residual)
        return x


class PuzzleModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: PuzzleConfig):
        super().__init__()
        self.config = config
        if config.norm_placement not in NORMS:
            raise ValueError(f"norm_placement '{config.norm_placement}' is not understood: {', '.join(NORMS)} are")
        ropes = config.ropes or {"default": config.rope_parameters}
        self.ropes = {name: Rope(config, parameters) for name, parameters in ropes.items()}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList()
        self.windows: list[
            Any
        ] = []  # of each cache slot, or "state"; slots number the layers that keep something, without gaps
        for index, layer_config in enumerate(config.per_layer_config or [config] * config.num_hidden_layers):
            self.layers.append(PuzzleLayer(layer_config, index, slot=len(self.windows)))
            self.windows += [layer_config.sliding_window] if self.layers[-1].attends else []
            self.windows += ["state"] if self.layers[-1].recurs else []
            if self.layers[-1].attends and layer_config.rope not in (None, *self.ropes):
                raise ValueError(
                    f"per_layer_config[{index}] has rope '{layer_config.rope}': {[*self.ropes]} and null are known"
                )
        self.norm = PuzzleRMSNorm(config.hidden_size, config)

    def new_cache(self) -> DynamicCache:
        """One slot per layer that keeps something: slot 0 is asked for the number of tokens and must never stay empty."""
        cache, kinds = DynamicCache(), {None: DynamicLayer, "state": PuzzleState}
        cache.layers = [kinds[w]() if w in kinds else DynamicSlidingWindowLayer(w) for w in self.windows]
        cache.layer_class_to_replicate = None
        return cache

    def adopt(self, cache: Cache) -> Cache:
        """Check a cache that was handed in; lay out an unused `DynamicCache(config=...)` as `new_cache` does."""
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"the cache is a {type(cache).__name__}: this model supports DynamicCache only")
        if (cache.layers or "state" in self.windows) and not any(
            getattr(slot, "is_initialized", False) for slot in cache.layers
        ):
            cache.layers = self.new_cache().layers
        return cache

    def crosses(self, begin: Tensor, end: Tensor) -> bool:
        """Whether a longrope changes its frequencies while sequences grow from `begin` to `end` tokens [B], so that what a cache
        holds of them is no longer right."""
        limits = [rope.switches_at for rope in self.ropes.values() if rope.switches_at is not None]
        return any(bool(((begin > 0) & (begin <= limit) & (end > limit)).any()) for limit in limits)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, *, cache: Cache | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        return_dict: bool | None = None, cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None, max_length_k: int | None = None, seq_idx: Tensor | None = None,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """input_ids [B, T] or inputs_embeds [B, T, E], attention_mask [B, S] -> last_hidden_state [B, T, E]

        position_ids [B or 1, T] that begin again at 0 tell packed sequences, which do not see each other; collators say the same again
        in the names from cu_seq_lens_q to seq_idx. cache and past_key_values are two names of one thing, for whichever transformers
        calls.
        """
        if output_attentions or return_dict is False:
            raise ValueError("this model never holds attention weights, and its decoder returns no tuples: leave "
                             "output_attentions and return_dict out")  # fmt: skip
        if cu_seq_lens_q is not None and (
            position_ids is None
            or (position_ids == 0).flatten().nonzero().flatten().tolist() != cu_seq_lens_q[:-1].tolist()
        ):
            raise ValueError("cu_seq_lens_q without position_ids that begin again at 0 in the same places: give both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embedding_multiplier != 1:
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype, device=x.device)
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing: give one of them")
        cache = given = past_key_values if cache is None else cache
        replayed = any(layer.training and layer.gradient_checkpointing for layer in self.layers)
        replayed = replayed and torch.is_grad_enabled()
        if cache is not None and replayed:
            raise ValueError("gradient checkpointing runs layers twice and would fill the cache twice: leave it out")
        if cache is None and not replayed and (self.config.use_cache if use_cache is None else use_cache):
            cache = self.new_cache()
        num_past = 0 if cache is None else self.adopt(cache).get_seq_length()
        num_new, num_all, real = x.shape[1], num_past + x.shape[1], None
        if attention_mask is not None and self.windows:
            if attention_mask.shape != (x.shape[0], num_all):
                raise ValueError(f"attention_mask has shape {list(attention_mask.shape)} instead of "
                                 f"{[x.shape[0], num_all]}: one entry per cached and new token")  # fmt: skip
            real = None if attention_mask.all() else attention_mask.bool()
        starts = None
        if position_ids is not None and self.windows:
            starts = sequence_starts(position_ids, num_past, real)
        if position_ids is None:
            position_ids = torch.arange(num_all, device=x.device)[None] if real is None else real.cumsum(-1) - 1
            position_ids = position_ids[:, num_past:].clamp(min=0)
        lengths = position_ids[:, -1:] + 1
        if starts is not None:
            if given is not None:
                raise ValueError("packed sequences, which position_ids tell, take no cache: leave it out")
            if "state" in self.windows:
                raise ValueError("position_ids tell of packed sequences, and a recurrent layer would carry its state from one to the next: "
                                 "give each sequence a row of its own")  # fmt: skip
            cache, position_ids = None, position_ids if real is None else position_ids.masked_fill(~real, 0)
            ends = torch.zeros_like(starts).scatter_reduce(1, starts, (position_ids + 1).expand_as(starts), "amax")
            lengths = ends.gather(1, starts)
        if num_past and self.crosses(position_ids[:, 0], lengths[:, -1]):
            raise ValueError("the cache ends before, the new tokens after the length where longrope changes its frequencies: "
                             "give the whole text without a cache, as `generate` does")  # fmt: skip
        ropes: dict[str | None, Any] = {
            name: rope.tables(position_ids, lengths, x.dtype) for name, rope in self.ropes.items()
        }
        ropes[None] = None
        spans = set(self.windows) - {"state"}
        masks: dict[Any, Any] = {window: visible(num_new, num_past, window, real, starts, x.device) for window in spans}
        masks["real"] = None if real is None else real[:, num_past:, None]

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: tuple[Tensor, ...] = ()
        for layer in self.layers:
            hidden_states += (x,) if wanted else ()
            x = layer(x, ropes, masks, cache)
        x = self.norm(x)
        return BaseModelOutputWithPast(x, cache, hidden_states=(*hidden_states, x) if wanted else None)


class PuzzleForCausalLM(PreTrainedModel, GenerationMixin):
    """PuzzleModel with a language-model head."""

    config_class: Any = PuzzleConfig
    decoder_class: Any = PuzzleModel
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    _no_split_modules = {"PuzzleLayer"}  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    accepts_loss_kwargs = True  # Trainer hands the forward num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Any):
        super().__init__(config)
        self.model = self.decoder_class(self.decoder_config(config))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = "state" in self.model.windows  # which no assistant can take tokens back from
        self.post_init()

    @staticmethod
    def decoder_config(config: Any) -> PuzzleConfig:
        """The decoder's own configuration; formats that say the same in other words translate here."""
        return config

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None, *,
        cache: Cache | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        num_items_in_batch: int | Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None, max_length_k: int | None = None,
        seq_idx: Tensor | None = None,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """As PuzzleModel; logits [B, T, V], or of the last `logits_to_keep` tokens; labels [B, T] for the loss.

        num_items_in_batch: labels of all micro-batches, which the loss is then divided by instead of its own.
        """
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, cache=cache, use_cache=use_cache,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions, cu_seq_lens_q=cu_seq_lens_q,
        )  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        logits = self.lm_head(out.last_hidden_state[:, keep])
        logits = logits if self.model.config.logits_scaling == 1 else logits / self.model.config.logits_scaling
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(loss, logits, getattr(out, CACHE_NAME), out.hidden_states)

    def get_decoder(self) -> PuzzleModel:
        return self.model

    def prepare_inputs_for_generation(self, input_ids, *args, attention_mask=None, inputs_embeds=None, **kwargs):
        """Where longrope changes its frequencies, an empty cache and the whole text, as Phi-3 does."""
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and (num_past := cache.get_seq_length()):
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if self.model.crosses(mask[:, :num_past].sum(-1), mask.sum(-1)):
                kwargs[CACHE_NAME], kwargs["next_sequence_length"] = self.model.new_cache(), None
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """Give `generate` a cache laid out for this model, without short slots where it will take tokens back."""
        if (kind := generation_config.cache_implementation) not in (None, "dynamic", "dynamic_full"):
            raise ValueError(f"cache_implementation='{kind}' is not supported by this model: leave it out")
        for name in CACHE_NAMES:
            if name != CACHE_NAME and model_kwargs.get(name) is not None:
                raise ValueError(f"{name}: `generate` of this transformers calls its cache {CACHE_NAME}")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None:
            full = kind == "dynamic_full" or generation_config.is_assistant or generation_mode == "assisted_generation"
            model_kwargs[CACHE_NAME] = DynamicCache() if full else self.model.new_cache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)  # type: ignore


PuzzleConfig.register_for_auto_class()
PuzzleForCausalLM.register_for_auto_class("AutoModelForCausalLM")
