"""The FFN without a gate, down(relu(up(n))²) of the normed input n (Primer, arXiv 2109.08668), as in Nemotron-H.

Letters: H hidden_size, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from puzzle.blocklib.ffn import Ffn
from puzzle.blocklib.sub_block import register


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class Relu2(Ffn):
    """An FFN without a gate: down(relu(up(n))²)."""

    kind: ClassVar[str] = "relu2"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.relu2:Relu2Ffn"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.relu2:FastRelu2"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.relu2:VllmRelu2Ffn"

    read_input: ClassVar[tuple[str, ...]] = ("up_proj.weight",)
