"""Seconds, bytes and parameters of any architecture made of one library's sub-blocks. Needs no torch.

The cost of a model is the sum of its measured parts as the whole parent corrects it (see `profile.cost_table`): times a factor, and in
decode on a GPU with what lies between two sub-blocks. Where weights are in one precision and the cache is in another, a decode step of
attention takes what the cache's table says, plus what the weights' takes more, or less, with nothing cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

from puzzle.base.machine import several
from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES, bytes_text
from puzzle.base.workload import PREFILL_ROWS, Workload
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.choose.precision import Way
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Prediction
from puzzle.parents.structure import Layer
from puzzle.profile.all_reduce import AllReduces
from puzzle.profile.cost_table import CostTable, around
from puzzle.profile.engine import EngineModel
from puzzle.profile.parts import Head, Part, ends_of, priced_as

ByUse = Mapping[str, str]  # of one layer: the precision of the weights in each slot
Placed = tuple[SubBlock, str]  # what runs, and the precision of its weights


class CostModel:
    """Seconds and bytes of architectures made of one library's sub-blocks, for one workload. table: of one precision, or a way to
    choose between several; `precisions` of sub-blocks that are not given are those of its first table. reduces: of the ranks that share
    the model; then seconds are of all ranks, which work side by side, and bytes of each; None: one GPU has it whole."""

    def __init__(
        self, library: Library, table: CostTable | EngineModel | Way, work: Workload, reduces: AllReduces | None = None
    ):
        self.way = table if isinstance(table, Way) else Way(tables={table.precision: table}, cache=table.precision)
        self.library, self.table, self.work = library, self.way.first, work
        self.reduces, self.tp = reduces, 1 if reduces is None else reduces.tp
        self.own = structure = library.origin.share(self.tp)  # what one rank runs of the parent
        work.check_fits(structure.max_length)
        self.bytes_per_element = PRECISION_BYTES[self.table.precision]
        self.batches = self.way.batches
        self.ends: list[Part] = ends_of(structure)
        middle = work.input_len + work.output_len // 2
        every = [(name, one, b) for name, one in self.way.tables.items() for b in self.batches]
        self._factors = {
            (name, b): (
                one.whole_over_parts(structure, "prefill", b, work.input_len),
                one.whole_over_parts(structure, "decode", b, middle),
            )
            for name, one, b in every
        }
        self._between = {(name, b): one.between_parts(structure, b) for name, one, b in every}
        self.has_host = self.table.host_seconds(self.batches[-1]) > 0
        self._seconds: dict[tuple[Part, int, str], tuple[float, float]] = {}
        self._workspace: dict[int, int] = {}
        self._every: list[Part] = [*(part.shared(self.tp) for part in library.sub_blocks()), *self.ends]

    @property
    def facts(self) -> dict[str, Any]:
        """Where prices come from, for architecture.json; of an engine also its export's format, room on the card and error."""
        table = self.table
        device = several(table.device, self.tp)
        found: dict[str, Any] = {"device": device, "precision": table.precision, "sha256": table.hash}
        if isinstance(table, EngineModel):
            found |= {"format": table.format, "room_bytes": table.room_bytes, "left_out": table.left_out}
        return found if self.reduces is None else found | {"all_reduce": self.reduces.facts}

    @property
    def length(self) -> int:
        """Tokens of a request, prompt and answer."""
        return self.work.input_len + self.work.output_len

    def part_seconds(self, part: Part, batch: int, precision: str | None = None) -> tuple[float, float]:
        """(prefill, all decode steps) of one part in this workload, the whole-over-parts factor included; linear in the batch
        between those that were measured."""
        own = precision or self.table.precision
        key = (part, batch, own)
        if key not in self._seconds:
            low, high = self.around(batch)
            if low == high:
                prefill, decode = self._factors[own, batch]
                found = (
                    prefill * self.way.tables[own].seconds(part, "prefill", batch, self.work.input_len),
                    decode * self._decode_seconds(part, batch, own),
                )
                if isinstance(part, SubBlock) and not isinstance(part, NoOp):
                    found = (found[0], max(0.0, found[1] + self._between[own, batch] * (self.work.output_len - 1)))
                sums = self._sums(part, batch)
                found = (found[0] + sums[0], found[1] + sums[1])
            else:
                less, more = self.part_seconds(part, low, own), self.part_seconds(part, high, own)
                share = (batch - low) / (high - low)
                found = (less[0] + (more[0] - less[0]) * share, less[1] + (more[1] - less[1]) * share)
            self._seconds[key] = found
        return self._seconds[key]

    def _sums(self, part: Part, batch: int) -> tuple[float, float]:
        """(prefill, all decode steps) that summing over ranks takes: what a sub-block or the embedding gives for every token, and the
        head's largest logit and its word, in float32, from each rank."""
        count = part.num_sums if isinstance(part, SubBlock) else 1
        if self.reduces is None or not count:
            return 0.0, 0.0
        each = 8 * self.tp if isinstance(part, Head) else self.own.hidden_size * FIXED_BYTES[self.table.precision]
        tokens = 1 if isinstance(part, Head) else self.work.input_len
        together = self._prompts_together()
        groups, rest = divmod(batch, together)
        prefill = groups * self.reduces.seconds(each * tokens * together) if groups else 0.0
        prefill += self.reduces.seconds(each * tokens * rest) if rest else 0.0
        return count * prefill, count * (self.work.output_len - 1) * self.reduces.seconds(each * batch)

    def _prompts_together(self) -> int:
        return max(1, PREFILL_ROWS // self.work.input_len)

    def _decode_seconds(self, part: Part, batch: int, precision: str) -> float:
        """All decode steps, as the tables have them."""
        own, kept = self.way.tables[precision], self.way.tables[self.way.cache]
        if own is kept or not isinstance(part, SubBlock) or not part.state():
            return own.decode_seconds(part, batch, self.work)
        assert isinstance(own, CostTable)
        assert isinstance(kept, CostTable)
        # A window may be full at any measured context.
        whole = replace(part, window=None) if isinstance(part, Gqa) else part
        alike = whole if own.has(whole) and kept.has(whole) else part
        weights = own.empty_seconds(alike, batch) - kept.empty_seconds(alike, batch)
        return max(0.0, kept.decode_seconds(part, batch, self.work) + weights * (self.work.output_len - 1))

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
        rows = self.work.input_len * min(batch, self._prompts_together())
        return 2 * rows * self.library.origin.hidden_size * FIXED_BYTES[self.table.precision]

    def workspace(self, batch: int) -> int:
        """Bytes beside weights and caches: the stream that comes into a sub-block, and what the sub-block of this library that
        needs most works with, so that no choice needs more. Sub-blocks run one after another in the same memory. 0 where
        workspaces were not measured."""
        if batch not in self._workspace:
            tables = self.way.tables.values()
            found = max(table.workspace(part, batch, self.work.input_len) for table in tables for part in self._every)
            self._workspace[batch] = found + self.stream(batch) if found else 0
        return self._workspace[batch]

    def kept_bytes(self, sub_block: SubBlock) -> int:
        """What one whole request keeps."""
        state = sub_block.state()
        return state.bytes_of(self.table.kept(state, self.length), self.way.cache)

    def runs(self, layer: Layer, index: int) -> list[SubBlock]:
        """What layer `index` runs: its own sub-blocks, or what an engine's export makes of them; a rank's share of each."""
        return [part.shared(self.tp) for part in self.table.lowered(layer, first=index == 0)]

    def placed(self, layer: Layer, index: int, precisions: ByUse | None) -> list[Placed]:
        """What layer `index` runs, each with the precision of its weights. Engines, which rewrite layers, have but one."""
        if not precisions:
            return [(part, self.table.precision) for part in self.runs(layer, index)]
        return [(part.shared(self.tp), precisions[slot]) for slot, part in layer.items()]

    def layer(self, layer: Layer, index: int = 1, precisions: ByUse | None = None) -> Stack:
        """One layer. index: of it; engines treat the first, 0, differently."""
        return Stack(self, [layer], self.placed(layer, index, precisions))

    def model(self, layers: Sequence[Layer], precisions: Sequence[ByUse] | None = None) -> Stack:
        """All layers of a model."""
        return Stack(self, layers, self._all(layers, precisions))

    def fixed(self, batch: int) -> dict[str, float]:
        """What `Stack.resources` says, of what no choice changes: embedding, final norm, LM head, workspace."""
        count = self.own.num_fixed_parameters
        parts = [self.part_seconds(part, batch) for part in self.ends]
        return self.timed(parts, self.host_seconds(batch)) | {
            "memory_bytes": count * FIXED_BYTES[self.table.precision] + self.workspace(batch),
            "num_parameters": self.library.origin.num_fixed_parameters,
            "active_parameters": self.library.origin.num_fixed_parameters,
        }

    def timed(self, parts: list[tuple[float, float]], host: float) -> dict[str, float]:
        """Seconds at the device's pace and, of an engine that may set its own, with decode steps at that one: a limit on time is one
        on both, each a sum over layers."""
        prefill, decode = sum(p for p, _ in parts), sum(d for _, d in parts)
        found = {"seconds": prefill + decode, "prefill_seconds": prefill, "decode_seconds": decode}
        return found | ({"host_seconds": prefill + host, "host_decode_seconds": host} if self.has_host else {})

    def host_pace(
        self, layers: Sequence[Layer], batch: int, change: Mapping[str, float] | None = None
    ) -> dict[str, float] | None:
        """From which batch on the engine's own Python sets the pace of decode steps, and milliseconds of a step at `batch` of each;
        None where the device does up to the largest batch."""
        if not self.has_host or self.work.output_len == 1:
            return None
        model = self.model(layers)
        paced = [b for b in self.every_batch if self.host_seconds(b) > model.device_seconds(b, change)[1]]
        if not paced:
            return None
        scale = 1e3 / (self.work.output_len - 1)
        return {
            "from_batch": paced[0],
            "batch": batch,
            "host_ms": scale * self.host_seconds(batch),
            "device_ms": scale * model.device_seconds(batch, change)[1],
        }

    def predict(
        self,
        layers: Sequence[Layer],
        batch: int,
        change: Mapping[str, float] | None = None,
        precisions: Sequence[ByUse] | None = None,
    ) -> Prediction:
        """`Stack.predict` of a whole model."""
        return self.model(layers, precisions).predict(batch, change)

    def _all(self, layers: Sequence[Layer], precisions: Sequence[ByUse] | None) -> list[Placed]:
        """What the whole model runs, with precisions."""
        by_layer: Sequence[ByUse | None] = precisions or [None] * len(layers)
        together = enumerate(zip(layers, by_layer, strict=True))
        return [one for index, (layer, own) in together for one in self.placed(layer, index, own)]

    def extrapolated(self, layers: Sequence[Layer], batch: int, precisions: Sequence[ByUse] | None = None) -> list[str]:
        """Which times of this architecture lie beyond the measured points, one line each."""
        parts, found = {(priced_as(end), self.table.precision) for end in self.ends}, []
        parts |= {(priced_as(p), n) for p, own in self._all(layers, precisions) for n in (own, self.way.cache)}
        for name, table in self.way.tables.items():
            told = f" in {name}" if len(self.way.tables) > 1 else ""
            for (part, phase, at), (low, high, measured) in sorted(table.extrapolated.items()):
                if (part, name) in parts and at in self.around(batch):
                    asked = f"{low}" if low == high else f"{low} to {high}"
                    found.append(f"{phase} of '{part}'{told}, batch {at}, tokens {asked} (measured: {measured})")
        return [*found, *self._sums_beyond(batch)]

    def _sums_beyond(self, batch: int) -> list[str]:
        """That the sums of a prefill are larger than those that were measured."""
        most = self.stream(batch) // 2
        if self.reduces is None or most <= self.reduces.largest:
            return []
        return [
            f"all-reduce of {bytes_text(most)} in prefill (measured: to {bytes_text(self.reduces.largest)}): by bandwidth"
        ]

    def best_parent(self, memory: int | None) -> Prediction:
        """The parent at its own best batch that fits `memory` (at the smallest batch when none does)."""
        whole = self.model(self.library.origin.layers)
        found = [whole.predict(b) for b in self.every_batch]
        fitting = [p for p in found if memory is None or p.memory_bytes <= memory] or found[:1]
        return max(fitting, key=lambda p: p.tokens_per_second)


class Stack:
    """Sub-blocks that run one after another: a layer, or all of a model. What is the same at every batch is added up once.

    layers: before tensor parallel, or an engine's export, makes `runs` of them. sizes: bytes of the weights, and of what a whole request
    keeps, for each of `runs`. num_parameters, active_parameters: of `layers`."""

    def __init__(self, costs: CostModel, layers: Sequence[Layer], runs: Sequence[Placed]):
        self.costs, self.runs = costs, runs
        self.sizes = [(PRECISION_BYTES[own] * _parameters(part)[0], costs.kept_bytes(part)) for part, own in runs]
        self._weights, self._kept = (sum(size[n] for size in self.sizes) for n in (0, 1))
        inside = [_parameters(sub_block) for layer in layers for sub_block in layer.values()]
        self.num_parameters, self.active_parameters = (sum(count[n] for count in inside) for n in (0, 1))

    def num_bytes(self, batch: int) -> int:
        """Of the weights, and of what `batch` whole requests keep."""
        return self._weights + self._kept * batch

    def cached_bytes(self, num_tokens: int) -> float:
        """Of the weights, and of what is kept for `num_tokens` tokens in sequences of the workload's length."""
        total = 0.0
        for weights, kept in self.sizes:
            total += weights + kept * num_tokens / self.costs.length
        return total

    def resources(self, batch: int) -> dict[str, float]:
        """Seconds, bytes and parameters, as the solver counts them."""
        costs = self.costs
        return costs.timed([costs.part_seconds(part, batch, own) for part, own in self.runs], 0.0) | {
            "memory_bytes": self.num_bytes(batch),
            "num_parameters": self.num_parameters,
            "active_parameters": self.active_parameters,
        }

    @cached_property
    def _order(self) -> tuple[list[tuple[Part, str]], list[int]]:
        """What runs, with embedding and head: each once, and their order."""
        every = [*self.runs, *((end, self.costs.table.precision) for end in self.costs.ends)]
        places = {one: n for n, one in enumerate(dict.fromkeys(every))}
        return list(places), [places[one] for one in every]

    def device_seconds(self, batch: int, change: Mapping[str, float] | None = None) -> tuple[float, float]:
        """(prefill, all decode steps) of a whole model at the device's pace. change: as `predict` has it."""
        change = change or {}
        prefill, decode = change.get("prefill_seconds", 0.0), change.get("decode_seconds", 0.0)
        every, order = self._order
        seconds = [self.costs.part_seconds(part, batch, own) for part, own in every]
        for place in order:
            first, rest = seconds[place]
            prefill, decode = prefill + first, decode + rest
        return prefill, decode

    def predict(self, batch: int, change: Mapping[str, float] | None = None) -> Prediction:
        """Of a whole model. change: what fusing layers adds to the resources (`puzzle.choose.fusion`)."""
        costs, change = self.costs, change or {}
        prefill, decode = self.device_seconds(batch, change)
        decode = max(decode, costs.host_seconds(batch))
        fixed = costs.fixed(batch)
        around = int(fixed["num_parameters"] + change.get("num_parameters", 0))
        per_token, per_sequence = self._state
        return Prediction(
            batch=batch,
            tokens_per_second=batch * costs.work.output_len / (prefill + decode),
            latency_seconds=prefill + decode,
            ttft_seconds=prefill,
            tpot_seconds=decode / max(1, costs.work.output_len - 1),
            memory_bytes=int(fixed["memory_bytes"] + change.get("memory_bytes", 0)) + self.num_bytes(batch),
            workspace_bytes=costs.workspace(batch) + int(change.get("workspace_bytes", 0)),
            kv_bytes_per_token=per_token,
            num_parameters=around + self.num_parameters,
            active_parameters=around + self.active_parameters,
            state_bytes=per_sequence,
        )

    @cached_property
    def _state(self) -> tuple[int, int]:
        """Bytes that a request keeps: of every token, and whatever its length."""
        cache, states = self.costs.way.cache, [part.state() for part, _ in self.runs]
        return PRECISION_BYTES[cache] * sum(s.per_token for s in states), sum(s.fixed_bytes(cache) for s in states)


@cache
def _parameters(sub_block: SubBlock) -> tuple[int, int]:
    """All, and those that a token uses."""
    return sub_block.num_parameters, sub_block.active_parameters()
