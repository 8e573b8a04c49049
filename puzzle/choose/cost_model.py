"""Seconds, bytes and parameters of any architecture made of one library's variants. Needs no torch.

The cost of a model is the sum of its measured parts times one factor, measured on the whole parent (see `costs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from puzzle.base.errors import UserError
from puzzle.base.workload import PREFILL_ROWS, Workload
from puzzle.library.manifest import KINDS, PARENT, Library
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel, sizes_of_part

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
FIXED_BYTES = {**DTYPE_BYTES, "fp8": 2}  # embedding and LM head stay in bf16
Choice = dict[str, str]  # {"attention": name, "ffn": name}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the cost model says of one architecture at one batch size. memory: weights, KV cache at full context, and
    workspace, what the largest sub-block of the library works with."""

    batch: int
    tokens_per_second: float
    latency_seconds: float
    ttft_seconds: float
    tpot_seconds: float
    memory_bytes: int
    workspace_bytes: int
    kv_bytes_per_token: int
    num_parameters: int


class CostModel:
    """Seconds and bytes of architectures made of one library's variants, for one workload."""

    def __init__(self, library: Library, table: CostTable | EngineModel, work: Workload):
        self.library, self.table, self.work = library, table, work
        model = library.facts["model"]
        if work.input_len + work.output_len > model["max_length"]:
            raise UserError(
                f"--input-len {work.input_len} + --output-len {work.output_len} exceed the parent's context of "
                f"{model['max_length']}"
            )
        self.bytes_per_element = DTYPE_BYTES[table.dtype]
        self.batches = table.batches
        head = model["head_shape"]
        self._fixed_parts = [("embedding", head), ("head", head)]
        parent = [(kind, library.variant(kind, PARENT)["shape"]) for kind in KINDS] * library.num_layers
        middle = work.input_len + work.output_len // 2
        self._factors = {
            b: (
                table.whole_over_parts(parent + self._fixed_parts, "prefill", b, work.input_len),
                table.whole_over_parts(parent + self._fixed_parts, "decode", b, middle),
            )
            for b in self.batches
        }
        self._seconds: dict[tuple[str, str, int], tuple[float, float]] = {}
        self._workspace: dict[int, int] = {}

    def part_seconds(self, kind: str, shape: str, batch: int) -> tuple[float, float]:
        """(prefill, all decode steps) of one part in this workload, the whole-over-parts factor included."""
        key = (kind, shape, batch)
        if key not in self._seconds:
            prefill, decode = self._factors[batch]
            self._seconds[key] = (
                prefill * self.table.seconds(kind, shape, "prefill", batch, self.work.input_len),
                decode * self.table.decode_seconds(kind, shape, batch, self.work),
            )
        return self._seconds[key]

    def stream(self, batch: int) -> int:
        """Bytes of the two tensors that come into a sub-block, of the prompts that go through together."""
        rows = self.work.input_len * min(batch, max(1, PREFILL_ROWS // self.work.input_len))
        hidden = self.library.facts["model"]["spec"]["hidden_size"]
        return 2 * rows * hidden * FIXED_BYTES[self.table.dtype]

    def workspace(self, batch: int) -> int:
        """Bytes beside weights and caches: the stream that comes into a sub-block, and what the sub-block of this library that
        needs most works with, so that no choice needs more. Sub-blocks run one after another in the same memory. 0 where
        workspaces were not measured."""
        if batch not in self._workspace:
            prompt = self.work.input_len
            shapes = [(k, self.library.variant(k, v)["shape"]) for k in KINDS for v in self.library.variants(k)]
            found = max(self.table.workspace(*part, batch, prompt) for part in shapes + self._fixed_parts)
            self._workspace[batch] = found + self.stream(batch) if found else 0
        return self._workspace[batch]

    def variant_bytes(self, kind: str, name: str, batch: int) -> int:
        facts = self.library.variant(kind, name)
        length = self.work.input_len + self.work.output_len
        cached = length if facts["window"] is None else min(length, facts["window"])
        return self.bytes_per_element * (facts["num_parameters"] + facts["kv_elements_per_token"] * cached * batch)

    def parts(self, choice: Choice, index: int) -> list[tuple[str, str]]:
        """(kind, shape) of what layer `index` runs: its own two sub-blocks, or what an engine's export makes of them."""
        shapes = {kind: self.library.variant(kind, choice[kind])["shape"] for kind in KINDS}
        if not isinstance(self.table, EngineModel):
            return list(shapes.items())
        parent = self.library.variant("attention", PARENT)["shape"]
        return self.table.lowered(shapes["attention"], shapes["ffn"], parent, first=index == 0)

    def extra(self, choice: Choice, index: int) -> tuple[int, int]:
        """(parameters, KV elements per token) that layer `index` has in an engine's export beyond its own."""
        found = [sizes_of_part(*part) for part in self.parts(choice, index)]
        own = [sizes_of_part(kind, self.library.variant(kind, choice[kind])["shape"]) for kind in KINDS]
        return sum(p for p, _ in found) - sum(p for p, _ in own), sum(k for _, k in found) - sum(k for _, k in own)

    def extra_bytes(self, choice: Choice, index: int, num_tokens: int) -> int:
        """Bytes of `extra` with the cache of `num_tokens` tokens; 0 where the table is of our own runtime."""
        if not isinstance(self.table, EngineModel):
            return 0
        parameters, elements = self.extra(choice, index)
        return self.bytes_per_element * (parameters + elements * num_tokens)

    def resources(self, choice: Choice, batch: int, index: int = 1) -> dict[str, float]:
        """Seconds, bytes and parameters of one layer's pair. index: of the layer; engines treat the first, 0, differently."""
        parts = [self.part_seconds(kind, shape, batch) for kind, shape in self.parts(choice, index)]
        length = self.work.input_len + self.work.output_len
        return self._timed(parts) | {
            "memory_bytes": sum(self.variant_bytes(kind, choice[kind], batch) for kind in KINDS)
            + self.extra_bytes(choice, index, batch * length),
            "num_parameters": sum(self.library.variant(kind, choice[kind])["num_parameters"] for kind in KINDS),
        }

    def fixed(self, batch: int) -> dict[str, float]:
        """The same of what no choice changes: embedding, final norm, LM head, workspace."""
        count = self.library.facts["model"]["num_fixed_parameters"]
        return self._timed([self.part_seconds(kind, shape, batch) for kind, shape in self._fixed_parts]) | {
            "memory_bytes": count * FIXED_BYTES[self.table.dtype] + self.workspace(batch),
            "num_parameters": count,
        }

    @staticmethod
    def _timed(parts: list[tuple[float, float]]) -> dict[str, float]:
        prefill, decode = sum(p for p, _ in parts), sum(d for _, d in parts)
        return {"seconds": prefill + decode, "prefill_seconds": prefill, "decode_seconds": decode}

    def cached_bytes(self, choice: Choice, num_tokens: int, index: int = 1) -> float:
        """Bytes of one layer's weights and of its cache for `num_tokens` tokens in sequences of the workload's length."""
        length = self.work.input_len + self.work.output_len
        total = 0.0
        for kind in KINDS:
            facts = self.library.variant(kind, choice[kind])
            share = 1.0 if facts["window"] is None else min(1.0, facts["window"] / length)
            total += facts["num_parameters"] + facts["kv_elements_per_token"] * num_tokens * share
        return self.bytes_per_element * total + self.extra_bytes(choice, index, num_tokens)

    def predict(self, layers: list[Choice], batch: int, change: Mapping[str, float] | None = None) -> Prediction:
        """Of the whole model. change: what fusing layers adds to the resources (`puzzle.choose.fusion`)."""
        change = change or {}
        prefill, decode = change.get("prefill_seconds", 0.0), change.get("decode_seconds", 0.0)
        parts = [part for index, layer in enumerate(layers) for part in self.parts(layer, index)]
        for kind, shape in parts + self._fixed_parts:
            first, rest = self.part_seconds(kind, shape, batch)
            prefill, decode = prefill + first, decode + rest
        fixed = self.fixed(batch)
        facts = [self.library.variant(kind, layer[kind]) for layer in layers for kind in KINDS]
        length = self.work.input_len + self.work.output_len
        return Prediction(
            batch=batch,
            tokens_per_second=batch * self.work.output_len / (prefill + decode),
            latency_seconds=prefill + decode,
            ttft_seconds=prefill,
            tpot_seconds=decode / max(1, self.work.output_len - 1),
            memory_bytes=int(fixed["memory_bytes"] + change.get("memory_bytes", 0))
            + sum(self.variant_bytes(kind, layer[kind], batch) for layer in layers for kind in KINDS)
            + sum(self.extra_bytes(layer, index, batch * length) for index, layer in enumerate(layers)),
            workspace_bytes=self.workspace(batch) + int(change.get("workspace_bytes", 0)),
            kv_bytes_per_token=self.bytes_per_element * sum(f["kv_elements_per_token"] for f in facts)
            + sum(self.extra_bytes(x, i, 1) - self.extra_bytes(x, i, 0) for i, x in enumerate(layers)),
            num_parameters=int(fixed["num_parameters"] + change.get("num_parameters", 0))
            + sum(f["num_parameters"] for f in facts),
        )

    def extrapolated(self, layers: list[Choice], batch: int) -> list[str]:
        """Which times of this architecture lie beyond the measured points, one line each."""
        parts = {part for index, layer in enumerate(layers) for part in self.parts(layer, index)} | {*self._fixed_parts}
        found = []
        for (kind, shape, phase, at), (low, high, measured) in sorted(self.table.extrapolated.items()):
            if (kind, shape) in parts and at == batch:
                asked = f"{low}" if low == high else f"{low} to {high}"
                found.append(f"{phase} of {kind} '{shape}', batch {batch}, tokens {asked} (measured: {measured})")
        return found

    def best_parent(self, memory: int | None) -> Prediction:
        """The parent at its own best batch that fits `memory` (at the smallest batch when none does)."""
        parent = [dict.fromkeys(KINDS, PARENT)] * self.library.num_layers
        found = [self.predict(parent, b) for b in self.batches]
        fitting = [p for p in found if memory is None or p.memory_bytes <= memory] or found[:1]
        return max(fitting, key=lambda p: p.tokens_per_second)
