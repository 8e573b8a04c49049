"""Seconds, bytes and parameters of any architecture made of one library's sub-blocks. Needs no torch.

The cost of a model is the sum of its measured parts as the whole parent corrects it (see `profile.cost_table`): times a factor, and in
decode on a GPU with what lies between two sub-blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES
from puzzle.base.workload import PREFILL_ROWS, Workload
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Prediction
from puzzle.parents.structure import Layer
from puzzle.profile.cost_table import CostTable, around
from puzzle.profile.engine import EngineModel
from puzzle.profile.parts import Part, ends_of, priced_as


class CostModel:
    """Seconds and bytes of architectures made of one library's sub-blocks, for one workload."""

    def __init__(self, library: Library, table: CostTable | EngineModel, work: Workload):
        self.library, self.table, self.work = library, table, work
        structure = library.structure
        work.check_fits(structure.max_length)
        self.bytes_per_element = PRECISION_BYTES[table.precision]
        self.batches = table.batches
        self.ends: list[Part] = ends_of(structure)
        middle = work.input_len + work.output_len // 2
        self._factors = {
            b: (
                table.whole_over_parts(structure, "prefill", b, work.input_len),
                table.whole_over_parts(structure, "decode", b, middle),
            )
            for b in self.batches
        }
        self._between = {b: table.between_parts(structure, b) for b in self.batches}
        self.has_host = table.host_seconds(self.batches[-1]) > 0
        self._seconds: dict[tuple[Part, int], tuple[float, float]] = {}
        self._workspace: dict[int, int] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """Where prices come from, for architecture.json; of an engine also its export's format and its room on the card."""
        table = self.table
        found: dict[str, Any] = {"device": table.device, "precision": table.precision, "sha256": table.hash}
        if isinstance(table, EngineModel):
            found |= {"format": table.format, "room_bytes": table.room_bytes}
        return found

    @property
    def length(self) -> int:
        """Tokens of a request, prompt and answer."""
        return self.work.input_len + self.work.output_len

    def part_seconds(self, part: Part, batch: int) -> tuple[float, float]:
        """(prefill, all decode steps) of one part in this workload, the whole-over-parts factor included; linear in the batch
        between those that were measured."""
        if (part, batch) not in self._seconds:
            low, high = self.around(batch)
            if low == high:
                prefill, decode = self._factors[batch]
                found = (
                    prefill * self.table.seconds(part, "prefill", batch, self.work.input_len),
                    decode * self.table.decode_seconds(part, batch, self.work),
                )
                if isinstance(part, SubBlock) and not isinstance(part, NoOp):
                    found = (found[0], max(0.0, found[1] + self._between[batch] * (self.work.output_len - 1)))
            else:
                less, more = self.part_seconds(part, low), self.part_seconds(part, high)
                share = (batch - low) / (high - low)
                found = (less[0] + (more[0] - less[0]) * share, less[1] + (more[1] - less[1]) * share)
            self._seconds[part, batch] = found
        return self._seconds[part, batch]

    def around(self, batch: int) -> tuple[int, int]:
        """The measured batches next to this one. Raises UserError beyond them."""
        return around(self.batches, batch)

    def host_seconds(self, batch: int) -> float:
        """The least that all decode steps take, at the pace of an engine's own Python; 0 where it never sets one."""
        return self.table.host_seconds(batch) * (self.work.output_len - 1)

    @property
    def every_batch(self) -> range:
        """All batch sizes that have a price."""
        return range(self.batches[0], self.batches[-1] + 1)

    def stream(self, batch: int) -> int:
        """Bytes of the two tensors that come into a sub-block, of the prompts that go through together."""
        rows = self.work.input_len * min(batch, max(1, PREFILL_ROWS // self.work.input_len))
        return 2 * rows * self.library.structure.hidden_size * FIXED_BYTES[self.table.precision]

    def workspace(self, batch: int) -> int:
        """Bytes beside weights and caches: the stream that comes into a sub-block, and what the sub-block of this library that
        needs most works with, so that no choice needs more. Sub-blocks run one after another in the same memory. 0 where
        workspaces were not measured."""
        if batch not in self._workspace:
            parts: list[Part] = [*self.library.sub_blocks(), *self.ends]
            found = max(self.table.workspace(part, batch, self.work.input_len) for part in parts)
            self._workspace[batch] = found + self.stream(batch) if found else 0
        return self._workspace[batch]

    def bytes_of(self, sub_block: SubBlock, batch: int) -> int:
        """Of its weights, and of what `batch` whole requests keep."""
        return self.bytes_per_element * (
            sub_block.num_parameters + sub_block.state().elements(self.length, self.table.page) * batch
        )

    def runs(self, layer: Layer, index: int) -> list[SubBlock]:
        """What layer `index` runs: its own sub-blocks, or what an engine's export makes of them."""
        return self.table.lowered(layer, first=index == 0)

    def resources(self, layer: Layer, batch: int, index: int = 1) -> dict[str, float]:
        """Seconds, bytes and parameters of one layer. index: of the layer; engines treat the first, 0, differently."""
        runs = self.runs(layer, index)
        return self._timed([self.part_seconds(part, batch) for part in runs], 0.0) | {
            "memory_bytes": sum(self.bytes_of(part, batch) for part in runs),
            "num_parameters": sum(sub_block.num_parameters for sub_block in layer.values()),
        }

    def fixed(self, batch: int) -> dict[str, float]:
        """The same of what no choice changes: embedding, final norm, LM head, workspace."""
        count = self.library.structure.num_fixed_parameters
        return self._timed([self.part_seconds(part, batch) for part in self.ends], self.host_seconds(batch)) | {
            "memory_bytes": count * FIXED_BYTES[self.table.precision] + self.workspace(batch),
            "num_parameters": count,
        }

    def _timed(self, parts: list[tuple[float, float]], host: float) -> dict[str, float]:
        """Seconds at the device's pace and, of an engine that may set its own, with decode steps at that one: a limit on time is one
        on both, each a sum over layers."""
        prefill, decode = sum(p for p, _ in parts), sum(d for _, d in parts)
        found = {"seconds": prefill + decode, "prefill_seconds": prefill, "decode_seconds": decode}
        return found | ({"host_seconds": prefill + host, "host_decode_seconds": host} if self.has_host else {})

    def cached_bytes(self, layer: Layer, num_tokens: int, index: int = 1) -> float:
        """Bytes of one layer's weights and of what it keeps for `num_tokens` tokens in sequences of the workload's length."""
        total = 0.0
        for part in self.runs(layer, index):
            state = part.state()
            kept = state.per_token * num_tokens * state.kept(self.length, self.table.page) / self.length
            total += part.num_parameters + kept + state.per_sequence * num_tokens / self.length
        return self.bytes_per_element * total

    def device_seconds(
        self, runs: Sequence[Part], batch: int, change: Mapping[str, float] | None = None
    ) -> tuple[float, float]:
        """(prefill, all decode steps) of a whole model of these sub-blocks at the device's pace. change: as `predict` has it."""
        change = change or {}
        prefill, decode = change.get("prefill_seconds", 0.0), change.get("decode_seconds", 0.0)
        for part in (*runs, *self.ends):
            first, rest = self.part_seconds(part, batch)
            prefill, decode = prefill + first, decode + rest
        return prefill, decode

    def host_pace(
        self, layers: Sequence[Layer], batch: int, change: Mapping[str, float] | None = None
    ) -> dict[str, float] | None:
        """From which batch on the engine's own Python sets the pace of decode steps, and milliseconds of a step at `batch` of each;
        None where the device does up to the largest batch."""
        if not self.has_host or self.work.output_len == 1:
            return None
        runs = [part for index, layer in enumerate(layers) for part in self.runs(layer, index)]
        paced = [b for b in self.every_batch if self.host_seconds(b) > self.device_seconds(runs, b, change)[1]]
        if not paced:
            return None
        scale = 1e3 / (self.work.output_len - 1)
        return {
            "from_batch": paced[0],
            "batch": batch,
            "host_ms": scale * self.host_seconds(batch),
            "device_ms": scale * self.device_seconds(runs, batch, change)[1],
        }

    def predict(self, layers: Sequence[Layer], batch: int, change: Mapping[str, float] | None = None) -> Prediction:
        """Of the whole model. change: what fusing layers adds to the resources (`puzzle.choose.fusion`)."""
        change = change or {}
        runs = [part for index, layer in enumerate(layers) for part in self.runs(layer, index)]
        prefill, decode = self.device_seconds(runs, batch, change)
        decode = max(decode, self.host_seconds(batch))
        fixed = self.fixed(batch)
        own = sum(sub_block.num_parameters for layer in layers for sub_block in layer.values())
        return Prediction(
            batch=batch,
            tokens_per_second=batch * self.work.output_len / (prefill + decode),
            latency_seconds=prefill + decode,
            ttft_seconds=prefill,
            tpot_seconds=decode / max(1, self.work.output_len - 1),
            memory_bytes=int(fixed["memory_bytes"] + change.get("memory_bytes", 0))
            + sum(self.bytes_of(part, batch) for part in runs),
            workspace_bytes=self.workspace(batch) + int(change.get("workspace_bytes", 0)),
            kv_bytes_per_token=self.bytes_per_element * sum(part.state().per_token for part in runs),
            num_parameters=int(fixed["num_parameters"] + change.get("num_parameters", 0)) + own,
        )

    def extrapolated(self, layers: Sequence[Layer], batch: int) -> list[str]:
        """Which times of this architecture lie beyond the measured points, one line each."""
        runs = {priced_as(part) for index, layer in enumerate(layers) for part in self.runs(layer, index)}
        parts, found = runs | {priced_as(part) for part in self.ends}, []
        for (part, phase, at), (low, high, measured) in sorted(self.table.extrapolated.items()):
            if part in parts and at in self.around(batch):
                asked = f"{low}" if low == high else f"{low} to {high}"
                found.append(f"{phase} of '{part}', batch {at}, tokens {asked} (measured: {measured})")
        return found

    def best_parent(self, memory: int | None) -> Prediction:
        """The parent at its own best batch that fits `memory` (at the smallest batch when none does)."""
        found = [self.predict(self.library.structure.layers, b) for b in self.every_batch]
        fitting = [p for p in found if memory is None or p.memory_bytes <= memory] or found[:1]
        return max(fitting, key=lambda p: p.tokens_per_second)
