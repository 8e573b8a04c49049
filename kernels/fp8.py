"""float8_e4m3fn: how values become fp8 with a scale, and what they are worth. Everything here that quantises does it this way.

Letters: N rows (of a weight: its outputs), K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite float8_e4m3fn
ROWS = 1024  # that become fp8, or come back, together: of a weight nothing else is held in float32


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] -> float8_e4m3fn [N, K] and scale [N] float32: largest magnitude of a row / 448, 1 for a row of zeros.

    A value x comes back within max(|x| / 16, scale / 1024): half a step of 3 bits, or of the smallest number.
    """
    found = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    for begin in range(0, len(x), ROWS):
        rows, at = x[begin : begin + ROWS], slice(begin, begin + ROWS)
        largest = rows.abs().amax(dim=1).float() / FP8_MAX
        scale[at] = torch.where(largest > 0, largest, 1.0)
        found[at] = (rows / scale[at, None]).clamp(-FP8_MAX, FP8_MAX)
    return found, scale


def from_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] = (1, 1), first: int = 0) -> Tensor:
    """weight [N, K] in float8_e4m3fn times its scales, in float32. [N, K]

    scale [R, C]: one for every `block` of (rows, columns), the last ones of which may be cut short; R or C of 1: one for all rows
    or columns. first: the weight's first row, where it is a stretch of what the scales are for.
    """
    found = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    columns = scale.float()
    if columns.shape[1] > 1:
        columns = columns.repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]
    for begin in range(0, len(weight), ROWS):
        rows = weight[begin : begin + ROWS].float()
        at = (torch.arange(len(rows), device=weight.device) + first + begin) // block[0]
        torch.mul(rows, columns if len(columns) == 1 else columns[at], out=found[begin : begin + ROWS])
    return found
