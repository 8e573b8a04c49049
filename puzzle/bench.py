"""A small static-batch runtime: whole parents and children, prefill and decode, on the functions that were profiled.

Letters: B batch, T prompt tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.blocklib.layer import KINDS
from puzzle.blocklib.runtime import KVCache, decode, new_cache, prefill
from puzzle.costs import Workload
from puzzle.model import CausalModel


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Medians over repeats. tokens_per_second: generated tokens of the batch over prefill and decode together."""

    batch: int
    tokens_per_second: float
    prefill_seconds: float
    decode_seconds: float
    weight_bytes: int
    kv_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes


def weight_bytes(model: CausalModel) -> int:
    return sum(t.numel() * t.element_size() for _, t in model.named_weights())


@torch.inference_mode()
def measure(models: dict[str, tuple[CausalModel, int]], work: Workload, repeats: int = 3) -> dict[str, Measured]:
    """Time every model at its batch on one workload, taking turns so that a slow minute falls on all alike.

    models: {name: (model, batch)}. Weights are as given; prompts are random tokens.
    """
    prompts, runners = {}, {}
    for name, (model, batch) in models.items():
        device = model.embedding.weight.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.embedding.num_embeddings, (batch, work.input_len), generator=generator)
        prompts[name] = ids.to(device)
        runners[name] = Runner(model, batch, work.input_len + work.output_len)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, runner in runners.items():
            begin = time.perf_counter()
            token = runner.prefill(prompts[name])
            _synchronize(token)
            middle = time.perf_counter()
            for position in range(work.input_len, work.input_len + work.output_len - 1):
                token = runner.step(token, position)
            _synchronize(token)
            if repeat:  # the first round warms up
                times[name].append((middle - begin, time.perf_counter() - middle))
    results = {}
    for name, (model, batch) in models.items():
        total = median(a + b for a, b in times[name])
        results[name] = Measured(
            batch=batch,
            tokens_per_second=batch * work.output_len / total,
            prefill_seconds=median(a for a, _ in times[name]),
            decode_seconds=median(b for _, b in times[name]),
            weight_bytes=weight_bytes(model),
            kv_bytes=runners[name].kv_bytes,
        )
    return results


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
