"""Softmax attention over a sliding window: the parent's weights, a bounded cache."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from puzzle.base.errors import UserError
from puzzle.blocklib.layer import LayerSpec, ParentLayer
from puzzle.blocklib.modules import Attention
from puzzle.blocklib.variant import Footprint, register
from puzzle.blocklib.variants.gqa import Gqa, attention_shape


@register("attention")
@dataclass(frozen=True, kw_only=True, slots=True)
class SlidingWindow:
    """`window-W`: a query sees itself and the W-1 tokens before it."""

    window: int

    @classmethod
    def parse(cls, text: str) -> SlidingWindow | None:
        found = re.fullmatch(r"window-(\d+)", text)
        return cls(window=int(found[1])) if found else None

    @classmethod
    def candidates(cls, spec: LayerSpec) -> list[str]:
        return ["window-128"] if spec.window is None or spec.window > 128 else []

    @property
    def name(self) -> str:
        return f"window-{self.window}"

    def matches_parent(self, spec: LayerSpec) -> bool:
        return self.window == spec.window

    def build(self, layer: ParentLayer) -> nn.Module:
        module = self.empty(layer.spec)
        module.load_state_dict({name: tensor.float() for name, tensor in layer.attention.items()})
        return module

    def empty(self, spec: LayerSpec) -> nn.Module:
        return Attention(spec, spec.num_key_value_heads, self.window)

    def footprint(self, spec: LayerSpec) -> Footprint:
        if self.window < 1 or (spec.window is not None and self.window > spec.window):
            limit = f" and at most the parent's {spec.window}" if spec.window else ""
            raise UserError(f"attention variant '{self.name}': a window is at least 1 token{limit}")
        return replace(Gqa.parent(spec).footprint(spec), window=self.window)

    def shape(self, spec: LayerSpec) -> str:
        return attention_shape(spec, spec.num_key_value_heads, self.window)

    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        return {"sliding_window": self.window}
