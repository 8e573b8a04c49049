"""A sub-block left out: no weights, no norm, no cache, no time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from puzzle.blocklib.layer import LayerSpec, ParentLayer
from puzzle.blocklib.modules import NoOp
from puzzle.blocklib.variant import Footprint, register


@dataclass(frozen=True, kw_only=True, slots=True)
class _NoSubBlock:
    @classmethod
    def parse(cls, text: str):
        return cls() if text == "none" else None

    @classmethod
    def candidates(cls, spec: LayerSpec) -> list[str]:
        return ["none"]

    @property
    def name(self) -> str:
        return "none"

    def matches_parent(self, spec: LayerSpec) -> bool:
        return False

    def build(self, layer: ParentLayer) -> nn.Module:
        return NoOp()

    def empty(self, spec: LayerSpec) -> nn.Module:
        return NoOp()

    def footprint(self, spec: LayerSpec) -> Footprint:
        return Footprint(num_parameters=0)

    def shape(self, spec: LayerSpec) -> str:
        return "none"


@register("attention")
@dataclass(frozen=True, kw_only=True, slots=True)
class NoAttention(_NoSubBlock):
    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        return {"skip": ["attention"]}


@register("ffn")
@dataclass(frozen=True, kw_only=True, slots=True)
class NoFfn(_NoSubBlock):
    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        return {"skip": ["mlp"]}
