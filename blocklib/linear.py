"""One H × H matrix after the norm: the cheapest stand-in that still mixes channels, for attention and for the FFN."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from puzzle.blocklib.sub_block import Normed, ParentBlock, State, SubBlock, Variant, divided, register, size

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Normed):
    """No bias. columns: that a rank of tensor parallel has of the matrix; None: all."""

    kind: ClassVar[str] = "linear"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.linear:LinearMap"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.linear:FastLinear"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.linear:VllmLinear"

    read_input: ClassVar[tuple[str, ...]] = ("linear.weight",)

    columns: int | None = size("columns", default=None)

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        return {"linear.weight": (self.hidden_size, self.columns or self.hidden_size)}

    def share(self, tp: int) -> Linear:
        return replace(self, columns=divided(self.hidden_size, tp, "hidden_size"))

    def state(self) -> State:
        return State()

    def symbol(self, parent: SubBlock) -> str:
        return "/"

    def words(self, parent: SubBlock) -> str:
        return "linear"

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        """In place of whatever knows a linear map to start from."""
        knows = isinstance(parent, Normed) and type(parent).linear_map is not SubBlock.linear_map
        return ["linear"] if knows else []

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """`linear`: the matrix that the parent's kind knows as the nearest to it, between the parent's norms."""
        if name != "linear" or not cls.stand_ins(parent):
            return None
        assert isinstance(parent, Normed)
        sub_block = cls(**parent.norm_fields())

        def initialise(block: ParentBlock) -> dict[str, Tensor]:
            norms = {n: t.float() for n, t in block.weights.items() if n in ("norm.weight", "post_norm.weight")}
            return {**norms, "linear.weight": parent.linear_map(block)}

        return Variant(name="linear", sub_block=sub_block, initialise=initialise)
