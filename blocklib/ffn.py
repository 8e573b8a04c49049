"""What FFNs of channels share, whatever computes a channel: widths, nests, and narrower ones by what each channel contributes.

Letters: H hidden_size, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from puzzle.base.errors import UserError
from puzzle.blocklib.sub_block import Initialise, Normed, ParentBlock, State, SubBlock, Variant, divided, size

if TYPE_CHECKING:
    from torch import Tensor

SHADES = "▁▂▃▄▅▆▇█"
SURGEON = "-obs"  # of names
FRACTIONS = ("0.75", "0.5", "0.25", "0.1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ffn(Normed):
    """Rows of the matrices that read the input and columns of down_proj, one of each for every channel; no kind by itself. bias: on all
    matrices."""

    added_once: ClassVar[tuple[str, ...]] = ("down_proj.bias",)

    intermediate_size: int = size("f", config="intermediate_size")
    bias: bool = size("bias", default=False)

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(self.read_input, (inner, hidden)),
            "down_proj.weight": (hidden, inner),
        }
        biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}
        return shapes | (biases if self.bias else {})

    def state(self) -> State:
        return State()

    def share(self, tp: int) -> Self:
        return replace(self, intermediate_size=divided(self.intermediate_size, tp, "intermediate_size"))

    def symbol(self, parent: SubBlock) -> str:
        """Its share of the parent's channels; `d` where the parent has no FFN of its kind."""
        if self == parent:
            return "█"
        if not isinstance(parent, type(self)):
            return "d"
        full = parent.intermediate_size
        if self.intermediate_size > full:
            return "+"
        return SHADES[min(len(SHADES) - 2, int(len(SHADES) * self.intermediate_size / full))]

    def words(self, parent: SubBlock) -> str:
        return f"{'' if isinstance(parent, type(self)) else 'dense, '}width {self.intermediate_size}"

    def begins(self, wider: SubBlock) -> bool:
        narrower = isinstance(wider, type(self)) and self.intermediate_size < wider.intermediate_size
        return narrower and replace(self, intermediate_size=wider.intermediate_size) == wider

    # -- in place of another FFN of its kind -----------------------------------------------------------------

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        return list(FRACTIONS) if isinstance(parent, cls) else []

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """`0.5`: the parent's most contributing channels, the most contributing first, this fraction of them, rounded to a width that
        hardware likes; `0.5-obs`: as many, chosen and corrected by second order (`initialize.surgeon`)."""
        number = name.removesuffix(SURGEON)
        try:
            fraction = float(number)
        except ValueError:
            return None
        if not isinstance(parent, cls):
            return None
        if not 0 < fraction <= 1:
            raise UserError(f"FFN variant '{name}': a width is a fraction of the parent's, above 0 and at most 1")
        width = narrowed(parent.intermediate_size, fraction)
        return Variant(
            name=f"{fraction:g}" + name.removeprefix(number),
            sub_block=replace(parent, intermediate_size=width),
            initialise=_narrow(width, name != number),
        )


def narrowed(full: int, fraction: float) -> int:
    """Channels kept of `full`: the nearest multiple of 256 (of 16 for small parents), at least one such step.

    Stock engines take FFN widths in steps of 256 (docs/architecture.md, "Narrow FFN widths").
    """
    if fraction == 1:
        return full
    step = 256 if full >= 4096 else min(16, full)
    return min(full, max(step, round(fraction * full / step) * step))


def _narrow(width: int, second_order: bool) -> Initialise:
    def initialise(block: ParentBlock) -> dict[str, Tensor]:
        from puzzle.blocklib.initialize import channel_order, surgeon

        assert isinstance(block.sub_block, Ffn)
        weights = {name: tensor.float() for name, tensor in block.weights.items()}
        if width < block.sub_block.intermediate_size:
            statistics = block.calibrated("a narrower FFN")
            down = weights["down_proj.weight"]
            if second_order:
                assert statistics.channel_gram is not None
                keep, down = surgeon(down, statistics.channel_gram(), width)
                down = down.to(weights["down_proj.weight"].device)
            else:
                keep = channel_order(block.weights["down_proj.weight"], statistics)[:width]
                down = down[:, keep.to(down.device)]
            for name in ("gate_proj.weight", "up_proj.weight", "gate_proj.bias", "up_proj.bias"):
                if name in weights:
                    weights[name] = weights[name][keep.to(weights[name].device)]
            weights["down_proj.weight"] = down
        return weights

    return initialise
