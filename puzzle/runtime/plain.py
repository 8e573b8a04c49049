"""A small static-batch runtime: whole parents and children, prefill and decode, on the functions that were profiled.

Letters: B batch, T prompt tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.blocklib.layer import KINDS
from puzzle.blocklib.runtime import KVCache, decode, new_cache, prefill
from puzzle.runtime.model import CausalModel


class Runner:
    """Greedy generation of a batch of equally long prompts with a static KV cache."""

    def __init__(self, model: CausalModel, batch: int, max_length: int):
        self.model = model
        like = model.embedding.weight
        self.rope = model.rope(max_length)
        self.caches: list[dict[str, KVCache | None]] = [
            {kind: new_cache(getattr(block, kind), batch, max_length, like) for kind in KINDS} for block in model.blocks
        ]

    @property
    def kv_bytes(self) -> int:
        return sum(c.num_bytes for caches in self.caches for c in caches.values() if c is not None)

    def randomize(self) -> None:
        """Fill the caches with noise, to time a decode step without a prompt."""
        for caches in self.caches:
            for cache in caches.values():
                if cache is not None:
                    cache.keys.normal_()
                    cache.values.normal_()

    def prefill(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> the first generated token of each sequence [B, 1]"""
        cos, sin = self.rope
        rope = cos[: ids.shape[1]], sin[: ids.shape[1]]
        x = F.embedding(ids, self.model.embedding.weight)
        for block, caches in zip(self.model.blocks, self.caches, strict=True):
            for kind in KINDS:
                x = prefill(getattr(block, kind), x, rope, caches[kind])
        return self.model.logits(x[:, -1:]).argmax(-1)

    def step(self, ids: Tensor, position: int) -> Tensor:
        """The token at `position` of each sequence [B, 1] -> the next one [B, 1]"""
        cos, sin = self.rope
        rope = cos[position : position + 1], sin[position : position + 1]
        x = F.embedding(ids, self.model.embedding.weight)
        for block, caches in zip(self.model.blocks, self.caches, strict=True):
            for kind in KINDS:
                x = decode(getattr(block, kind), x, rope, caches[kind], position)
        return self.model.logits(x).argmax(-1)

    def generate(self, ids: Tensor, num_tokens: int) -> Tensor:
        """Greedy continuation. ids [B, T] -> [B, num_tokens]"""
        out = [self.prefill(ids)]
        for position in range(ids.shape[1], ids.shape[1] + num_tokens - 1):
            out.append(self.step(out[-1], position))
        return torch.cat(out, dim=1)
