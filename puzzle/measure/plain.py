"""Times of whole models on the plain runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from puzzle.base.workload import Workload
from puzzle.runtime.model import CausalModel
from puzzle.runtime.plain import Runner


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
