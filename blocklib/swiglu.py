"""The gated FFN, down(act(gate(n)) · up(n)) of the normed input n (arXiv 2002.05202): SwiGLU, or GeGLU by its activation.

Letters: H hidden_size, F intermediate_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from puzzle.blocklib.ffn import Ffn
from puzzle.blocklib.sub_block import register, size


@register
@dataclass(frozen=True, kw_only=True, slots=True)
class SwiGLU(Ffn):
    """activation: "silu", or "gelu_tanh" (GeGLU, with the tanh approximation)."""

    kind: ClassVar[str] = "swiglu"
    plain: ClassVar[str | None] = "puzzle.blocklib.plain.swiglu:GatedFfn"
    in_training: ClassVar[str | None] = "puzzle.blocklib.fast.training:FfnInTraining"
    on_kernels: ClassVar[str | None] = "puzzle.blocklib.fast.swiglu:FastSwiGLU"
    on_vllm: ClassVar[str | None] = "puzzle.blocklib.vllm.swiglu:VllmGatedFfn"

    read_input: ClassVar[tuple[str, ...]] = ("gate_proj.weight", "up_proj.weight")

    activation: str = size("act", default="silu", choices=("silu", "gelu_tanh"))
