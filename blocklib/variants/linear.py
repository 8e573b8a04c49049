"""A sub-block replaced by one H × H matrix after its norm, for attention and for the FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from puzzle.blocklib.initialize import attention_as_linear, ffn_as_linear
from puzzle.blocklib.layer import LayerSpec, ParentLayer
from puzzle.blocklib.modules import Linear
from puzzle.blocklib.variant import Footprint, register


@dataclass(frozen=True, kw_only=True, slots=True)
class _LinearSubBlock:
    @classmethod
    def parse(cls, text: str):
        return cls() if text == "linear" else None

    @classmethod
    def candidates(cls, spec: LayerSpec) -> list[str]:
        return ["linear"]

    @property
    def name(self) -> str:
        return "linear"

    def matches_parent(self, spec: LayerSpec) -> bool:
        return False

    def empty(self, spec: LayerSpec) -> nn.Module:
        return Linear(spec)

    def footprint(self, spec: LayerSpec) -> Footprint:
        return Footprint(num_parameters=spec.hidden_size * (spec.hidden_size + 1))

    def shape(self, spec: LayerSpec) -> str:
        return f"h{spec.hidden_size} linear"

    def _load(self, spec: LayerSpec, norm: Tensor, matrix: Tensor) -> nn.Module:
        module = Linear(spec)
        module.load_state_dict({"norm.weight": norm.float(), "linear.weight": matrix})
        return module


@register("attention")
@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention(_LinearSubBlock):
    """Attention where every token sees only itself: O · V."""

    def build(self, layer: ParentLayer) -> nn.Module:
        matrix = attention_as_linear(layer.attention, layer.spec)
        return self._load(layer.spec, layer.attention["norm.weight"], matrix)

    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        return {"linear": ["attention"]}


@register("ffn")
@dataclass(frozen=True, kw_only=True, slots=True)
class LinearFfn(_LinearSubBlock):
    """The linear map nearest to the FFN on the calibration tokens."""

    def build(self, layer: ParentLayer) -> nn.Module:
        if layer.calibration is None:
            raise ValueError("a linear FFN needs calibration statistics")
        return self._load(layer.spec, layer.ffn["norm.weight"], ffn_as_linear(layer.calibration))

    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        return {"linear": ["mlp"]}
