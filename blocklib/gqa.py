"""Softmax attention with grouped KV heads (GQA, arXiv 2305.13245): any number of KV heads, a window, biases, per-head norms, sinks.

Letters: H hidden_size, N num_attention_heads, K num_key_value_heads, D head_dim.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from puzzle.base.errors import UserError
from puzzle.blocklib.sub_block import Initialise, Normed, ParentBlock, State, SubBlock, Variant, divided, register, size

if TYPE_CHECKING:
    from torch import Tensor

DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # one character for a number of KV heads


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Gqa(Normed):
    """window: tokens that a query sees, itself included; None: all. qk_norm: an RMS norm on q and k, of each "head" (Qwen3) or of
    "all" heads together (OLMo-2). rope: which of the model's RoPE tables; None: no positions (SmolLM3). scale: of the scores;
    None: 1 / √D. sinks: a learned logit per query head joins the softmax, and its share of the weights is dropped (gpt-oss)."""

    kind: ClassVar[str] = "gqa"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.gqa:Attention"
    in_training: ClassVar[str | None] = "puzzle.blocklib.fast.training:AttentionInTraining"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.gqa:FastAttention"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.gqa:VllmAttention"

    read_input: ClassVar[tuple[str, ...]] = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    added_once: ClassVar[tuple[str, ...]] = ("o_proj.bias",)

    num_attention_heads: int = size("q")
    num_key_value_heads: int = size("kv", config="num_key_value_heads")
    head_dim: int = size("d")
    window: int | None = size("window", config="sliding_window", default=None)
    qkv_bias: bool = size("qkv_bias", default=False)
    o_bias: bool = size("o_bias", default=False)
    qk_norm: str | None = size("qk_norm", default=None, choices=("head", "all"))
    rope: str | None = size("rope", config="rope", default="default")
    scale: float | None = size("scale", default=None)
    sinks: bool = size("sinks", default=False)

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "q_proj.weight": (queries, self.hidden_size),
            "k_proj.weight": (keys, self.hidden_size),
            "v_proj.weight": (keys, self.hidden_size),
            "o_proj.weight": (self.hidden_size, queries),
        }
        if self.qkv_bias:
            shapes |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
        if self.o_bias:
            shapes["o_proj.bias"] = (self.hidden_size,)
        if self.qk_norm is not None:
            each = self.qk_norm == "head"
            q_size, k_size = (self.head_dim, self.head_dim) if each else (queries, keys)
            shapes |= {"q_norm.weight": (q_size,), "k_norm.weight": (k_size,)}
        if self.sinks:
            shapes["sinks"] = (self.num_attention_heads,)
        return shapes

    def state(self) -> State:
        return State(per_token=2 * self.num_key_value_heads * self.head_dim, reach=self.window)

    def saved(self, context: int) -> int:
        """q, k, v, what is attended and float32 sums of each head's scores, none of the scores; where q and k are normed three more of them.
        A window's blocks of queries have their keys twice, for every head, and masks of so many keys a token: bool, and as what is added."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        queries, both = heads * self.head_dim, (heads + kv_heads) * self.head_dim
        found = 2 * both + 2 * heads + 2 * self.sinks * queries
        found += (3 + self.norm_offset) * both + 2 * (heads + kv_heads) if self.qk_norm else 0
        if self.window is None or self.window >= context:
            return found
        return found + 6 * queries + 3 * min(context, 2 * max(self.window, 128)) // 2

    def mixing_flops(self, context: float) -> float:
        """Scores and values: 4 · N · D per token of context."""
        return 4 * self.num_attention_heads * self.head_dim * context

    def share(self, tp: int) -> Gqa:
        """Query heads and KV heads are divided as vLLM does: fewer KV heads than ranks are repeated."""
        if self.qk_norm == "all":
            raise UserError(f"`tp` {tp}: a norm over all heads together (qk_norm=all) has no share: use 1")
        heads, kv = divided(self.num_attention_heads, tp, "num_attention_heads"), self.num_key_value_heads
        own = 1 if tp % kv == 0 else divided(kv, tp, "num_key_value_heads")
        return replace(self, num_attention_heads=heads, num_key_value_heads=own)

    def timed(self) -> Self:
        # zero-argument super() does not work in a dataclass with slots
        return replace(Normed.timed(self), rope="default", scale=None)

    def symbol(self, parent: SubBlock) -> str:
        if self == parent:
            return "█"
        if isinstance(parent, Gqa) and self.window != parent.window:
            return "w"
        return DIGITS[self.num_key_value_heads] if self.num_key_value_heads < len(DIGITS) else "+"

    def words(self, parent: SubBlock) -> str:
        of = f" of {parent.num_key_value_heads}" if isinstance(parent, Gqa) else ""
        return f"{self.num_key_value_heads}{of} KV heads" + (f", window {self.window}" if self.window else "")

    # -- in place of another attention -----------------------------------------------------------------------

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        """Half the KV heads, again and again down to one, or the next divisor below where they do not halve; and a window of 128."""
        if not isinstance(parent, Gqa):
            return []
        names, heads = [], parent.num_key_value_heads
        kv = heads
        while kv > 1:
            kv = next(count for count in range(kv // 2, 0, -1) if heads % count == 0)
            names.append(f"kv{kv}")
        return [*names, *(["window-128"] if parent.window is None or parent.window > 128 else [])]

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """`kvK`: K KV heads, each the mean of those that it replaces. `window-W`: the parent's weights over the last W tokens."""
        found = re.fullmatch(r"(kv|window-)(\d+)", name)
        if found is None or not isinstance(parent, Gqa):
            return None
        number = int(found[2])
        if found[1] == "kv":
            heads = parent.num_key_value_heads
            if number < 1 or heads % number:
                raise UserError(
                    f"attention variant '{name}': the parent's {heads} KV heads do not merge into {number}; give a divisor "
                    f"of {heads}"
                )
            return Variant(name=name, sub_block=replace(parent, num_key_value_heads=number), initialise=_merge(number))
        if number < 1 or (parent.window is not None and number > parent.window):
            limit = f" and at most the parent's {parent.window}" if parent.window else ""
            raise UserError(f"attention variant '{name}': a window is at least 1 token{limit}")
        return Variant(name=name, sub_block=replace(parent, window=number), initialise=_keep)


def _keep(block: ParentBlock) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in block.weights.items()}


def _merge(num_merged: int) -> Initialise:
    def initialise(block: ParentBlock) -> dict[str, Tensor]:
        from puzzle.blocklib.initialize import merge_kv_heads

        assert isinstance(block.sub_block, Gqa)
        heads, weights = block.sub_block.num_key_value_heads, _keep(block)
        merged = ["k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"]
        merged += ["k_norm.weight"] if block.sub_block.qk_norm == "all" else []
        for name in merged:
            if name in weights:
                weights[name] = merge_kv_heads(weights[name], heads, num_merged)
        return weights

    return initialise
