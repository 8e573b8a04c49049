"""What each token may see, for modeling_puzzle.py: windows, padding, and several sequences packed in one row.

Letters: B batch, T new tokens, S all tokens so far (cached ones included).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sequence_starts(positions: Tensor, num_past: int, real: Tensor | None) -> Tensor | None:
    """Of rows that hold several sequences, after how many tokens of its row that of each token begins [B, T]; None: all hold one.

    What tells them are positions [B or 1, T] that begin again at 0, as TRL and transformers pack without padding. real [B, S] is False
    at padding. Raises ValueError for other jumps of the positions, and where tokens are cached.
    """
    num_new = positions.shape[1]
    if num_new == 1:
        return None
    before = torch.arange(num_past, num_past + num_new, device=positions.device)
    starts, kept = before - positions, torch.ones_like(positions, dtype=torch.bool)
    if real is not None:
        starts, kept = real.cumsum(-1)[:, num_past:] - 1 - positions, real[:, num_past:]
    furthest = starts.masked_fill(~kept, -num_past - num_new).cummax(-1).values
    if not (kept & (starts != furthest[:, -1:])).any():
        return None
    if num_past or (kept & ((starts != furthest) | (starts < 0))).any():
        raise ValueError("position_ids jump: packed sequences begin at 0, go up by 1, and take no cached tokens")
    return starts.masked_fill(~kept, 0)


def visible(
    num_new: int, num_past: int, window: int | None, real: Tensor | None, starts: Tensor | None, device: Any
) -> Tensor | None:
    """True where a query may see a key. [T, S], or [B, 1, T, S] with padding or packing; None: every key up to its own.

    real [B, S] is False at padding; starts: as of `sequence_starts`. Every query, padding too, sees itself: no row is empty. A
    query alone needs no mask for its window, since PuzzleAttention cuts the keys.
    """
    num_all = num_past + num_new
    plain = real is None and starts is None
    if plain and (num_new == 1 or (num_past == 0 and (window is None or window >= num_all))):
        return None
    query, key = torch.arange(num_past, num_all, device=device)[:, None], torch.arange(num_all, device=device)
    mask = key <= query if window is None else (key <= query) & (key > query - window)
    if starts is not None:
        mask = mask & (starts[:, None, :, None] == starts[:, None, None, :])
    return mask if real is None else (mask & real[:, None, None]) | (key == query)
