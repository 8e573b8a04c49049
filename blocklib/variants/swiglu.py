"""A narrower SwiGLU FFN that keeps the parent's most contributing channels; in full it is the parent's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from puzzle.base.errors import UserError
from puzzle.blocklib.initialize import channel_order
from puzzle.blocklib.layer import LayerSpec, ParentLayer, ffn_shapes
from puzzle.blocklib.modules import SwiGLU
from puzzle.blocklib.variant import Footprint, register


@register("ffn")
@dataclass(frozen=True, kw_only=True, slots=True)
class NarrowFfn:
    """`0.5`: this fraction of the parent's channels, rounded to a width that hardware and engines like."""

    fraction: float

    @classmethod
    def parse(cls, text: str) -> NarrowFfn | None:
        try:
            fraction = float(text)
        except ValueError:
            return None
        if not 0 < fraction <= 1:
            raise UserError(f"FFN variant '{text}': a width is a fraction of the parent's, above 0 and at most 1")
        return cls(fraction=fraction)

    @classmethod
    def parent(cls, spec: LayerSpec) -> NarrowFfn:
        return cls(fraction=1.0)

    @classmethod
    def candidates(cls, spec: LayerSpec) -> list[str]:
        return ["0.75", "0.5", "0.25", "0.1"]

    @property
    def name(self) -> str:
        return f"{self.fraction:g}"

    def width(self, spec: LayerSpec) -> int:
        """Channels kept: the nearest multiple of 256 (of 16 for small parents), at least one such step.

        Stock engines take FFN widths in steps of 256 (docs/architecture.md, "Widths").
        """
        if self.fraction == 1:
            return spec.intermediate_size
        step = 256 if spec.intermediate_size >= 4096 else min(16, spec.intermediate_size)
        return min(spec.intermediate_size, max(step, round(self.fraction * spec.intermediate_size / step) * step))

    def matches_parent(self, spec: LayerSpec) -> bool:
        return self.width(spec) == spec.intermediate_size

    def build(self, layer: ParentLayer) -> nn.Module:
        module, width = self.empty(layer.spec), self.width(layer.spec)
        weights = {name: tensor.float() for name, tensor in layer.ffn.items()}
        if width < layer.spec.intermediate_size:
            if layer.calibration is None:
                raise ValueError("a narrower FFN needs calibration statistics")
            keep = channel_order(layer.ffn, layer.calibration)[:width].sort().values
            for name in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
                if name in weights:
                    weights[name] = weights[name][keep.to(weights[name].device)]
            weights["down_proj.weight"] = weights["down_proj.weight"][:, keep.to(weights["down_proj.weight"].device)]
        module.load_state_dict(weights)
        return module

    def empty(self, spec: LayerSpec) -> nn.Module:
        return SwiGLU(spec, self.width(spec))

    def footprint(self, spec: LayerSpec) -> Footprint:
        count = 0
        for shape in ffn_shapes(spec, self.width(spec)).values():
            count += shape[0] * (shape[1] if len(shape) == 2 else 1)
        return Footprint(num_parameters=count)

    def shape(self, spec: LayerSpec) -> str:
        return f"h{spec.hidden_size} f{self.width(spec)}{'+bias' if spec.mlp_bias else ''}"

    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        return {} if self.matches_parent(spec) else {"intermediate_size": self.width(spec)}
