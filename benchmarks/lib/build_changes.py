"""What makes a step of block-local distillation fast, each turned off by a patch: to measure what it is worth.

norm      matrices hold the norm's scale, so that no product gives a gradient of the input and all variants share x̂
adamw     one pass for the gradients' norm and one for masters, moments and copies, in place of torch's pass by pass
window    windows in blocks, in place of a mask over all pairs of tokens
rope      rotation in one pass each way
gate      silu(gate) · up in one pass each way
loss      the output's gradient in one pass, Σ target² once a place
cudnn     cuDNN's attention first, in place of PyTorch's own order
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest.mock import patch

from torch import Tensor

from puzzle.blocklib import distill, masters
from puzzle.blocklib.fast.training import AttentionInTraining, FfnInTraining, InTraining
from puzzle.blocklib.plain import gqa
from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.plain.swiglu import GatedFfn
from puzzle.kernels import block_loss
from puzzle.kernels.adamw import adamw_reference


def gradient_of_loss(child: Tensor, parent: Tensor, energy: Tensor) -> Tensor:
    """Σ target² again for each variant."""
    return block_loss.output_gradient(child, parent, block_loss.energy(parent))


OFF: dict[str, list[tuple[object, str, object]]] = {
    "norm": [(masters, "folds_norm", lambda sub_block: False), (InTraining, "enter", Part.enter)],
    "adamw": [(masters, "adamw", adamw_reference)],
    "rope": [(AttentionInTraining, "turn", Attention.turn)],
    "gate": [(FfnInTraining, "gated", GatedFfn.gated)],
    "loss": [(distill, "output_gradient", gradient_of_loss), (distill, "energy", lambda target: target)],
    "window": [(gqa, "BLOCK", 2**30)],
    "attention": [(AttentionInTraining, "attend", Attention.attend)],
}


@contextlib.contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Inside, these changes are turned off. Raises KeyError for an unknown name."""
    with contextlib.ExitStack() as stack:
        for name in names:
            for place, attribute, value in OFF[name]:
                stack.enter_context(patch.object(place, attribute, value))
        yield


def one_by_one(never: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(what is turned on, what is still off): nothing first, then one more each time, but for those that stay off."""
    names = [name for name in OFF if name not in never]
    yield "nothing", [*names, *never]
    for index, name in enumerate(names, start=1):
        yield name, [*names[index:], *never]
