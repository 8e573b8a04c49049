"""What is counted of a parent's sub-block over calibration tokens. Needs no torch.

Letters: H hidden_size, F channels that the last matrix reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-4  # of the mean diagonal of the Gram matrix: keeps the solve stable when tokens are few
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, RIDGE)  # of the same, to choose from


@dataclass(kw_only=True, slots=True)
class Statistics:
    """Of a parent's FFN or recurrent kind over calibration tokens, summed in float64.

    channel_sum [F]: Σ|x_i| of what its last matrix reads. channel_gram() [F, F]: Σ x xᵀ of the same, computed when it is asked for.
    """

    num_tokens: int
    channel_sum: Tensor
    channel_gram: Callable[[], Tensor] | None = None


@dataclass(eq=False)
class Moments:
    """Of a parent's sub-block of any kind over calibration tokens, summed in float64 over every other sequence each: Σ n nᵀ of what enters
    its matrices (normed, where there is a norm before), and Σ y nᵀ with y what they give (before a norm after). [2, H, H] each"""

    grams: Tensor
    crosses: Tensor

    @cached_property
    def damped(self) -> Tensor:
        """Σ n nᵀ + λI over all, with the λ of `best_ridge`. [H, H]"""
        return ridged(self.grams.sum(0), best_ridge(self))

    @property
    def cross(self) -> Tensor:
        """Over all. [H, H]"""
        return self.crosses.sum(0)


def best_ridge(moments: Moments) -> float:
    """Of `RIDGES` that with the least error of either half's map on the other half's tokens, as λ is as large in all.

    Where tokens are not many times the channels, the map that is best on them is worse than nothing on others (docs/lessons.md).
    """
    import torch

    (one, other), (given, wanted) = moments.grams, moments.crosses
    whole = one + other

    def error(ridge: float) -> float:
        total = 0.0
        for gram, cross, there, y in ((one, given, other, wanted), (other, wanted, one, given)):
            matrix = torch.linalg.solve(ridged(gram, ridge, like=whole), cross.T).T
            total += float((matrix * (matrix @ there - 2 * y)).sum())
        return total

    return min(RIDGES, key=error)  # the largest, where there is one sequence alone


def ridged(gram: Tensor, ridge: float = RIDGE, *, like: Tensor | None = None) -> Tensor:
    """Σ n nᵀ + λI, λ being `ridge` of the mean diagonal, of the other Gram matrix `like` where one is given. [H, H]"""
    import torch

    level = ridge * (gram if like is None else like).diagonal().mean().clamp(min=1e-30)
    return gram + level * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
