"""Nothing: no weights, no norm, no state, no time; adds nothing to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from puzzle.blocklib.sub_block import State, SubBlock, Variant, register


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class NoOp(SubBlock):
    """The sub-block left out."""

    kind: ClassVar[str] = "none"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.none:Nothing"
    num_sums: ClassVar[int] = 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {}

    def state(self) -> State:
        return State()

    def share(self, tp: int) -> NoOp:
        return self

    def symbol(self, parent: SubBlock) -> str:
        return "·"

    def fast(self, part: Any, batch: Any) -> None:
        return None

    def in_vllm(self, place: Any) -> None:
        return None

    def words(self, parent: SubBlock) -> str:
        return "none"

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        return [] if isinstance(parent, NoOp) else ["none"]

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        return Variant(name="none", sub_block=cls(), initialise=lambda block: {}) if name == "none" else None


NO_OP = NoOp()
