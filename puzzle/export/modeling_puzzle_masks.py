"""What each token may see, for modeling_puzzle.py: windows, padding, several sequences packed in one row, and sinks.

Letters: B batch, T new tokens, S all tokens so far (cached ones included), H heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, sinks: Tensor | None) -> Tensor:
    """Softmax attention of q [B, H, T, D] over k and v [B, K, S, D], by a mask of `visible`. sinks [H]: a logit of every head that joins
    its softmax: that of one more key, before all others, whose value is 0: 1 in a dimension where queries have the sink."""
    causal, dim = mask is None and q.shape[2] > 1, q.shape[3]
    if mask is not None:  # the fast kernels take a mask or grouped heads, not both
        mask = mask[..., -k.shape[2] :]
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    shared = k.shape[1] != q.shape[1]
    if sinks is not None:
        scale = dim**-0.5 if scale is None else scale
        extra = (sinks / scale).to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
        q, v = torch.cat((q, extra), dim=-1), F.pad(v, (0, 1, 1, 0))
        own = F.pad(k.new_ones(1), (dim, 0)).expand(*k.shape[:2], 1, dim + 1)
        k = torch.cat((own, F.pad(k, (0, 1))), dim=2)
        q = F.pad(q, (0, 0, 1, 0)) if causal else q
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=shared)
    return out if sinks is None else out[:, :, int(causal) :, :dim]
