"""One H × H matrix after the norm, or two of low rank: the cheapest stand-in that still mixes channels, for attention and
for the FFN.

Letters: H hidden_size, R rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from puzzle.base.errors import UserError
from puzzle.blocklib.sub_block import Normed, ParentBlock, State, SubBlock, Variant, divided, register, size

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Linear(Normed):
    """No bias. rank: of the product U V of two matrices; None: there is one. columns: that a rank of tensor parallel has of the
    one; None: all."""

    kind: ClassVar[str] = "linear"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.linear:LinearMap"
    in_training: ClassVar[str | None] = "puzzle.blocklib.fast.training:LinearInTraining"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.linear:FastLinear"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.linear:VllmLinear"

    read_input: ClassVar[tuple[str, ...]] = ("linear.weight", "linear.v.weight")

    rank: int | None = size("rank", default=None)
    columns: int | None = size("columns", default=None)

    def inner_tensors(self) -> dict[str, tuple[int, ...]]:
        if self.rank is not None:
            return {"linear.v.weight": (self.rank, self.hidden_size), "linear.u.weight": (self.hidden_size, self.rank)}
        return {"linear.weight": (self.hidden_size, self.columns or self.hidden_size)}

    def share(self, tp: int) -> Linear:
        """Columns of one matrix; of two a part of what passes between them."""
        if self.rank is not None:
            return replace(self, rank=divided(self.rank, tp, "rank"))
        return replace(self, columns=divided(self.hidden_size, tp, "hidden_size"))

    def state(self) -> State:
        return State()

    def symbol(self, parent: SubBlock) -> str:
        return "/" if self.rank is None else "r"

    def words(self, parent: SubBlock) -> str:
        return "linear" if self.rank is None else f"linear, rank {self.rank}"

    @classmethod
    def stand_ins(cls, parent: SubBlock) -> list[str]:
        """In place of any kind with norms but this one."""
        return ["linear"] if isinstance(parent, Normed) and not isinstance(parent, cls) else []

    @classmethod
    def stand_in(cls, parent: SubBlock, name: str) -> Variant | None:
        """`linear`: the matrix that is nearest to the parent's sub-block (`linear_map`), between its norms. `linear-R`: two whose product
        is nearest to that matrix on the parent's inputs; `linear-R-svd`: whose product is nearest to it by itself (`initialize.low_rank`)."""
        first, *rest = name.split("-", 1)
        if first != "linear" or not cls.stand_ins(parent):
            return None
        assert isinstance(parent, Normed)
        rank, by_inputs = None, True
        if rest:
            found = re.fullmatch(r"(\d+)(-svd)?", rest[0])
            rank, by_inputs = int(found[1]) if found else 0, not (found and found[2])
            if not 0 < rank <= parent.hidden_size:
                raise UserError(
                    f"variant '{name}': a rank is a whole number from 1 to the hidden size {parent.hidden_size}"
                )
            name = f"linear-{rank}" + ("" if by_inputs else "-svd")
        sub_block = cls(**parent.norm_fields(), rank=rank)

        def initialise(block: ParentBlock) -> dict[str, Tensor]:
            from puzzle.blocklib.initialize import low_rank

            norms = {n: t.float() for n, t in block.weights.items() if n in ("norm.weight", "post_norm.weight")}
            matrix = parent.linear_map(block)
            if rank is None:
                return {**norms, "linear.weight": matrix}
            gram = block.measured(f"a linear map of rank {rank}").damped if by_inputs else None
            u, v = low_rank(matrix, gram, rank)
            return {**norms, "linear.v.weight": v, "linear.u.weight": u}

        # Attention began as O · V once, then all with one λ.
        return Variant(name=name, sub_block=sub_block, initialise=initialise, edition=1 + (parent.kind == "gqa"))
