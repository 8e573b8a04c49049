"""How a sub-block runs at inference: prefill of a whole prompt, then decode one token a step over a static cache.

All sequences of a batch have the same length (a static batch). Letters: B batch, T prompt tokens, S cache slots,
H hidden_size, K num_key_value_heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.modules import Attention, NoOp, Rope


class KVCache:
    """K and V of one attention sub-block. [B, K, S, D] each; a windowed one keeps the last `window` tokens in a ring."""

    def __init__(self, attention: Attention, batch: int, max_length: int, like: Tensor):
        self.window = attention.window
        self.slots = max_length if self.window is None else min(max_length, self.window)
        shape = (batch, attention.num_kv_heads, self.slots, attention.head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Store a prompt's K and V. [B, K, T, D]"""
        num_tokens = k.shape[2]
        kept = min(num_tokens, self.slots)
        positions = torch.arange(num_tokens - kept, num_tokens, device=k.device) % self.slots
        if num_tokens <= self.slots:
            self.keys[:, :, :num_tokens], self.values[:, :, :num_tokens] = k, v
        else:
            self.keys[:, :, positions], self.values[:, :, positions] = k[:, :, -kept:], v[:, :, -kept:]

    def append(self, k: Tensor, v: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Store one token's K and V [B, K, 1, D]; all that it may attend to, in any order (softmax has none)."""
        slot = position % self.slots
        self.keys[:, :, slot], self.values[:, :, slot] = k[:, :, 0], v[:, :, 0]
        seen = min(position + 1, self.slots)
        return self.keys[:, :, :seen], self.values[:, :, :seen]


def new_cache(module: nn.Module, batch: int, max_length: int, like: Tensor) -> KVCache | None:
    """The cache that a sub-block needs, in the dtype and on the device of `like`; None for most."""
    return KVCache(module, batch, max_length, like) if isinstance(module, Attention) else None


def prefill(module: nn.Module, x: Tensor, rope: Rope, cache: KVCache | None) -> Tensor:
    """x [B, T, H] -> x plus the sub-block's contribution; K and V go to the cache. rope covers positions 0…T-1."""
    if isinstance(module, NoOp):
        return x
    if cache is None or not isinstance(module, Attention):
        return x + module(x, rope)
    q, k, v = module.project(x, rope)
    cache.fill(k, v)
    return x + module.attend(q, k, v)


def decode(module: nn.Module, x: Tensor, rope: Rope, cache: KVCache | None, position: int) -> Tensor:
    """x [B, 1, H] at `position` -> x plus the sub-block's contribution. rope holds that position's row alone."""
    if isinstance(module, NoOp):
        return x
    if cache is None or not isinstance(module, Attention):
        return x + module(x, rope)
    q, k, v = module.project(x, rope)
    keys, values = cache.append(k, v, position)
    return x + module.output(decode_attention(q, keys, values))


def decode_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query per sequence over its cache. q [B, N, 1, D], keys and values [B, K, S, D] -> [B, N, 1, D]

    The query heads that share a KV head become the rows of one product, so K and V are read once, not once a head.
    """
    batch, heads, _, dim = q.shape
    groups = heads // keys.shape[1]
    rows = q.view(batch, keys.shape[1], groups, dim)
    return F.scaled_dot_product_attention(rows, keys, values).reshape(batch, heads, 1, dim)
