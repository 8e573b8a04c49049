"""Softmax attention in plain PyTorch, and its cache.

Letters: B batch, T tokens, S cache slots, H hidden_size, N num_attention_heads, K num_key_value_heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.part import Part, Ropes, causal_mask, rotate

BLOCK = 128  # queries that share their keys under a window, at least


class Attention(Part):
    """Grouped-query softmax attention, causal, optionally over a sliding window."""

    def __init__(self, sub_block: Gqa):
        super().__init__(sub_block)
        self.num_heads, self.num_kv_heads = sub_block.num_attention_heads, sub_block.num_key_value_heads
        self.head_dim, self.window, self.scale = sub_block.head_dim, sub_block.window, sub_block.scale
        self.rope, self.qk_norm = sub_block.rope, sub_block.qk_norm
        hidden, q_size, kv_size = (
            sub_block.hidden_size,
            *(h * self.head_dim for h in (self.num_heads, self.num_kv_heads)),
        )
        self.q_proj = nn.Linear(hidden, q_size, bias=sub_block.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=sub_block.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=sub_block.qkv_bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=sub_block.o_bias)
        if self.qk_norm is not None:
            sizes = (self.head_dim, self.head_dim) if self.qk_norm == "head" else (q_size, kv_size)
            self.q_norm, self.k_norm = (self.rms_norm(n, sub_block.norm_eps, sub_block.norm_offset) for n in sizes)
        self.register_parameter("sinks", nn.Parameter(torch.empty(self.num_heads)) if sub_block.sinks else None)
        self.finish()

    def heads(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """[B, T, heads · D] -> [B, T, heads, D], normed"""
        shape = (*x.shape[:-1], -1, self.head_dim)
        if norm is None:
            return x.view(shape)
        return norm(x.view(shape)) if self.qk_norm == "head" else norm(x).view(shape)

    def project(self, entered: Tensor, ropes: Ropes) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, normed and rotated q [B, N, T, D], k and v [B, K, T, D]."""
        norms = (None, None) if self.qk_norm is None else (self.q_norm, self.k_norm)
        q = self.heads(self.q_proj(entered), norms[0]).transpose(1, 2)
        k = self.heads(self.k_proj(entered), norms[1]).transpose(1, 2)
        v = self.heads(self.v_proj(entered), None).transpose(1, 2)
        return (q, k, v) if self.rope is None else (self.turn(q, ropes[self.rope]), self.turn(k, ropes[self.rope]), v)

    def turn(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return rotate(x, rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of T new queries over the same T keys. [B, T, H]"""
        num_tokens = q.shape[2]
        if self.window is None or self.window >= num_tokens:
            return self.output(attention(q, k, v, None, self.scale, self.sinks))
        if num_tokens > 2 * (block := max(self.window, BLOCK)):
            return self.output(windowed_attention(q, k, v, self.window, block, self.scale, self.sinks))
        mask = causal_mask(num_tokens, self.window, q.device)
        # With a mask, only equally many heads of q and k spare a GPU the scores [B, N, T, T] in float32.
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
        return self.output(attention(q, k, v, mask, self.scale, self.sinks))

    def output(self, attended: Tensor) -> Tensor:
        """[B, N, T, D] -> [B, T, H]"""
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def inner(self, entered: Tensor, ropes: Ropes) -> Tensor:
        return self.attend(*self.project(entered, ropes))

    def new_state(self, batch: int, max_length: int, like: Tensor) -> KVCache:
        return KVCache(self, batch, max_length, like)

    def prefill(self, x: Tensor, ropes: Ropes, state: KVCache) -> Tensor:
        q, k, v = self.project(self.enter(x), ropes)
        state.fill(k, v)
        return x + self.leave(self.attend(q, k, v))

    def decode(self, x: Tensor, ropes: Ropes, state: KVCache, position: int) -> Tensor:
        q, k, v = self.project(self.enter(x), ropes)
        keys, values = state.append(k, v, position)
        return x + self.leave(self.output(decode_attention(q, keys, values, self.scale, self.sinks)))


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, sinks: Tensor | None
) -> Tensor:
    """Softmax attention of q [B, N, T, D] over k and v [B, K, T, D]: causal, or by a mask. sinks [N]: of a head, a logit beside its scores.

    A sink is the score of one more key, before all others, whose value is 0: 1 in a dimension of its own, in which a query has the sink of its head.
    """
    # Else scores [B, N, T, T] are written down there.
    if q.shape[1] != k.shape[1] and q.is_cuda and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    causal, shared, dim = mask is None, q.shape[1] != k.shape[1], q.shape[3]
    if sinks is not None:
        scale = dim**-0.5 if scale is None else scale
        extra = (sinks / scale).to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)
        q, v = torch.cat((q, extra), dim=-1), F.pad(v, (0, 1, 1, 0))
        own = F.pad(k.new_ones(1), (dim, 0)).expand(*k.shape[:2], 1, dim + 1)
        k = torch.cat((own, F.pad(k, (0, 1))), dim=2)
        q, mask = (F.pad(q, (0, 0, 1, 0)), None) if mask is None else (q, F.pad(mask, (1, 0), value=True))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=shared)
    return out if sinks is None else out[:, :, int(causal) :, :dim]


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, block: int, scale: float | None, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention over a sliding window of at most `block` tokens: a block of queries sees its own keys and the block before, so
    that the work grows with T and not with its square. q [B, N, T, D], k and v [B, K, T, D] -> [B, N, T, D]"""
    batch, heads, num_tokens, _ = q.shape
    count, groups = -(-num_tokens // block), heads // k.shape[1]
    missing = count * block - num_tokens

    def blocks(x: Tensor) -> Tensor:
        """[B, heads, T, D] -> [B, T / block, heads, block, D]"""
        return F.pad(x, (0, 0, 0, missing)).unflatten(2, (count, block)).transpose(1, 2)

    def seen(x: Tensor) -> Tensor:
        """[B, K, T, D] -> [B · T / block, N, 2 · block, D]"""
        own = blocks(x)
        before = F.pad(own, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat((before, own), dim=3).flatten(0, 1).repeat_interleave(groups, dim=1)

    mask = causal_mask(2 * block, window, q.device)[block:]
    first = mask & (torch.arange(2 * block, device=q.device) >= block)  # nothing comes before the first block
    masks = torch.cat((first[None], mask.expand(count - 1, -1, -1))).repeat(batch, 1, 1)[:, None]
    out = attention(blocks(q).flatten(0, 1), seen(k), seen(v), masks, scale, sinks)
    return out.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3)[:, :, :num_tokens]


class KVCache:
    """K and V of one attention. [B, K, S, D] each; a windowed one keeps the last `window` tokens in a ring."""

    def __init__(self, attention: Attention, batch: int, max_length: int, like: Tensor):
        self.slots = attention.sub_block.state().kept(max_length)
        shape = (batch, attention.num_kv_heads, self.slots, attention.head_dim)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def randomize(self) -> None:
        """Fill with noise, to time a decode step without a prompt."""
        self.keys.normal_()
        self.values.normal_()

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


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, scale: float | None, sinks: Tensor | None = None
) -> Tensor:
    """One query per sequence over its cache. q [B, N, 1, D], keys and values [B, K, S, D], sinks [N] -> [B, N, 1, D]

    The query heads that share a KV head become the rows of one product, so K and V are read once, not once a head.
    """
    batch, heads, _, dim = q.shape
    groups = heads // keys.shape[1]
    rows = q.view(batch, keys.shape[1], groups, dim)
    if sinks is not None:
        scores = rows @ keys.transpose(2, 3) * (dim**-0.5 if scale is None else scale)
        beside = sinks.to(scores.dtype).view(1, -1, groups, 1).expand(batch, -1, -1, 1)
        weights = torch.cat((scores, beside), dim=-1).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))[
            ..., :-1
        ]
        return (weights.to(values.dtype) @ values).reshape(batch, heads, 1, dim)
    return F.scaled_dot_product_attention(rows, keys, values, scale=scale).reshape(batch, heads, 1, dim)
