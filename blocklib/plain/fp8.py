"""A sub-block as engines run it in fp8: its weights rounded once, what its matrices read token by token, keys and values cached."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy

from torch import Tensor, nn

from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.plain.part import Part, Ropes
from puzzle.blocklib.sub_block import MissingFace
from puzzle.kernels.fp8 import from_fp8, to_fp8


def rounded(x: Tensor) -> Tensor:
    """x [..., K] as fp8 with a scale per row gives it back, in its own dtype."""
    values, scale = to_fp8(x.flatten(0, -2))
    return from_fp8(values, scale[:, None]).view(x.shape).to(x.dtype)


def round_activations(module: nn.Module, kept: Collection[str] = ()) -> None:
    """From now on, every matrix in it, but for those whose names are in `kept`, reads what it reads rounded per token."""
    for name, one in module.named_modules():
        if isinstance(one, nn.Linear) and name not in kept:
            one.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))


def weights_in_fp8(part: Part) -> Part:
    """A copy with weights and activations rounded. Raises MissingFace for a kind with matrices that are no linear layers."""
    found = deepcopy(part)
    linear = [module for module in found.modules() if isinstance(module, nn.Linear)]
    if len(linear) != sum(parameter.ndim > 1 for parameter in found.parameters()):
        raise MissingFace(part.sub_block.kind, "form in fp8")
    for module in linear:
        module.weight = nn.Parameter(rounded(module.weight.data), requires_grad=False)
    round_activations(found)
    return found


def cache_in_fp8(part: Attention) -> Attention:
    """A copy with keys and values rounded, each with one scale for all that is cached."""
    found = deepcopy(part)

    def project(entered: Tensor, ropes: Ropes) -> tuple[Tensor, Tensor, Tensor]:
        q, *cached = Attention.project(found, entered, ropes)
        k, v = (rounded(x.reshape(1, -1)).view(x.shape) for x in cached)
        return q, k, v

    found.project = project  # type: ignore[method-assign]
    return found
