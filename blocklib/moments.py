"""What is counted of a parent's sub-block over calibration tokens. Needs no torch.

Letters: H hidden_size, F channels that the last matrix reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class Statistics:
    """Of a parent's FFN or recurrent kind over calibration tokens, summed in float64.

    channel_sum [F]: Σ|x_i| of what its last matrix reads. channel_gram() [F, F]: Σ x xᵀ of the same, computed when it is asked for.
    """

    num_tokens: int
    channel_sum: Tensor
    channel_gram: Callable[[], Tensor] | None = None


class Moments(NamedTuple):
    """Of a parent's sub-block of any kind over calibration tokens, summed in float64: Σ n nᵀ of what enters its matrices (normed, where
    there is a norm before), and Σ y nᵀ with y what they give (before a norm after). [H, H] each"""

    gram: Tensor
    cross: Tensor
