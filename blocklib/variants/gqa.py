"""Softmax attention with fewer KV heads; with all of them it is the parent's own attention."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from puzzle.base.errors import UserError
from puzzle.blocklib.initialize import merge_kv_heads
from puzzle.blocklib.layer import LayerSpec, ParentLayer, attention_shapes
from puzzle.blocklib.modules import Attention
from puzzle.blocklib.variant import Footprint, register


@register("attention")
@dataclass(frozen=True, kw_only=True, slots=True)
class Gqa:
    """`kvK`: K key-value heads, each the mean of the parent heads that it replaces."""

    num_key_value_heads: int

    @classmethod
    def parse(cls, text: str) -> Gqa | None:
        found = re.fullmatch(r"kv(\d+)", text)
        return cls(num_key_value_heads=int(found[1])) if found else None

    @classmethod
    def parent(cls, spec: LayerSpec) -> Gqa:
        return cls(num_key_value_heads=spec.num_key_value_heads)

    @classmethod
    def candidates(cls, spec: LayerSpec) -> list[str]:
        counts, kv = [], spec.num_key_value_heads
        while kv > 1 and kv % 2 == 0:
            kv //= 2
            counts.append(f"kv{kv}")
        return counts

    @property
    def name(self) -> str:
        return f"kv{self.num_key_value_heads}"

    def matches_parent(self, spec: LayerSpec) -> bool:
        return self.num_key_value_heads == spec.num_key_value_heads

    def build(self, layer: ParentLayer) -> nn.Module:
        spec, module = layer.spec, self.empty(layer.spec)
        weights = {name: tensor.float() for name, tensor in layer.attention.items()}
        for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
            if name in weights:
                weights[name] = merge_kv_heads(weights[name], spec.num_key_value_heads, self.num_key_value_heads)
        module.load_state_dict(weights)
        return module

    def empty(self, spec: LayerSpec) -> nn.Module:
        return Attention(spec, self.num_key_value_heads, spec.window)

    def footprint(self, spec: LayerSpec) -> Footprint:
        kv = self.num_key_value_heads
        if kv < 1 or spec.num_key_value_heads % kv:
            raise UserError(
                f"attention variant 'kv{kv}': the parent's {spec.num_key_value_heads} KV heads do not merge into {kv}; "
                f"give a divisor of {spec.num_key_value_heads}"
            )
        shapes = attention_shapes(spec, kv)
        return Footprint(
            num_parameters=sum(_numel(s) for s in shapes.values()),
            kv_elements_per_token=2 * kv * spec.head_dim,
            window=spec.window,
        )

    def shape(self, spec: LayerSpec) -> str:
        return attention_shape(spec, self.num_key_value_heads, spec.window)

    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        return {} if self.matches_parent(spec) else {"num_key_value_heads": self.num_key_value_heads}


def attention_shape(spec: LayerSpec, num_key_value_heads: int, window: int | None) -> str:
    """The cost-table key of a softmax attention."""
    flags = ("+bias" if spec.qkv_bias or spec.o_bias else "") + ("+qknorm" if spec.qk_norm else "")
    reach = f" window{window}" if window else ""
    return f"h{spec.hidden_size} q{spec.num_attention_heads} kv{num_key_value_heads} d{spec.head_dim}{reach}{flags}"


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
