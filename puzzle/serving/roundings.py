"""Other roundings of the same forward: what a mixture's numbers differ by though nothing is wrong.

A rounding that lets a token have other experts changes all that follows for it, so that the mean over a few dozen prompts is made by
the few in which that happens, and which these are depends on the last bit of anything. Of such a model one run says little; several
whose roundings differ say how far right answers lie from one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from puzzle.runtime.model import CausalModel

# Of the elements: moves by one unit in the last place then have the variance of four more roundings, about what a sub-block makes.
MOVED = 1 / 3


@contextmanager
def rounded_otherwise(model: CausalModel, seed: int) -> Iterator[None]:
    """While it is open, MOVED of the elements that a sub-block of `model` adds to the stream are one unit in the last place larger or smaller."""
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)

    def move(part: Any, given: Any, out: Tensor) -> Tensor:
        drawn = torch.rand(out.shape, generator=generator, device=device)
        way = (drawn < MOVED / 2).float() - (drawn > 1 - MOVED / 2).float()
        # Half an epsilon of the value is half a unit to one, and comes to one when it is rounded.
        return (out.float() * (1 + way * torch.finfo(out.dtype).eps * 0.51)).to(out.dtype)

    hooks = [part.register_forward_hook(move) for _, _, part in model.parts()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def round_to(model: CausalModel, dtype: torch.dtype) -> CausalModel:
    """The model in `dtype`, in place, as it is loaded in it: tensors that are `exact` keep their own."""
    kept = [part.get_parameter(name) for _, _, part in model.parts() for name in _exact(part)]
    values = [parameter.data for parameter in kept]
    model.to(dtype)
    for parameter, value in zip(kept, values, strict=True):
        parameter.data = value
    return model


def _exact(part: Any) -> list[str]:
    """Of a module, which may lack some that its kind names."""
    return [name for name in part.sub_block.exact if name in part.sub_block.tensors()]
