"""`puzzle solve --fusion`: what it saves, and what it costs, that neighbouring FFNs become one. Needs no torch.

Every cell that is a gated FFN of width w alone gets a twin: the same layer, fused
with the next one. Where the next layer also takes such a pair, of width v, a term between the two cells adds
    seconds   T(w + v) - T(w) - T(v)                            per phase, batch and workload
    bytes     one norm less
    score     e_{i,i+1} · KL_{i+1}
T is the time of an FFN by width: from the cost table between its widths, and beyond its widest with the slope of its last
two. A table without a width beyond the parent's has no T there: then T(w) = a + b·w, fitted by least squares at each
batch, in all three places, so that a fused pair saves a. e is the relative error of FFN i + 1 without FFN i (dependency.json, "ffns"), and
KL_{i+1} the score of leaving FFN i + 1 out: an error of the size of the whole contribution costs what its absence does, and a
KL divergence grows with the square of a small error. Without a dependency file the charge is zero.

Runs longer than two add up pair by pair: exact where T is affine and, for the score, where an FFN misses its neighbour alone.
`Fusion.summary` gives the difference for the runs that were chosen; predictions use T of the whole run. A layer without FFN
ends a run here, although `puzzle fuse` can reach over it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.sub_block import parse_key
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.choose.cells import Cell
from puzzle.choose.cost_model import CostModel
from puzzle.fuse.matrix import MADE_BY, Rows, read_dependency
from puzzle.fuse.runs import Run
from puzzle.library.manifest import Library, score_name
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel
from puzzle.profile.parts import priced_as
from puzzle.solver.problem import Pair

TIMES = ("seconds", "prefill_seconds", "decode_seconds", "host_seconds", "host_decode_seconds")
CHANGED = (*TIMES, "memory_bytes", "num_parameters", "active_parameters", "cached_bytes")
Seconds = tuple[float, float]  # prefill, all decode steps


class WideFfn:
    """Seconds of FFNs by width in one workload, of one cost model."""

    def __init__(self, costs: CostModel):
        self.costs = costs
        own = {layer.get("ffn") for layer in costs.library.origin.layers}
        gated = [ffn for ffn in own if isinstance(ffn, SwiGLU)]
        if len(gated) != 1 or len(own) != 1:
            kinds = ", ".join(sorted("nothing" if ffn is None else ffn.key() for ffn in own))
            raise UserError(f"`fusion`: the parent's FFNs ({kinds}) are not one gated FFN for all layers")
        self.own = gated[0]
        if self.own.norm != "before":
            raise UserError("`fusion`: an FFN with a norm after it cannot be added to its neighbour's: leave it out")
        self._known: dict[int, list[tuple[int, Seconds]]] = {}

    @property
    def engine(self) -> bool:
        return isinstance(self.costs.table, EngineModel)

    def of(self, width: int) -> SwiGLU:
        """The parent's FFN with this many channels, or a rank's share of it."""
        return replace(self.own, intermediate_size=width).shared(self.costs.tp)

    def known(self, batch: int) -> list[tuple[int, Seconds]]:
        """Measured points (width, seconds), by width. Raises UserError for fewer than two."""
        if batch not in self._known:
            points = []
            assert isinstance(self.costs.table, CostTable)
            for key in self.costs.table.parts():
                found = parse_key(key) if key.startswith(f"{SwiGLU.kind} ") else None
                if isinstance(found, SwiGLU) and priced_as(self.of(found.intermediate_size * self.costs.tp)) == key:
                    points.append((found.intermediate_size * self.costs.tp, self.costs.part_seconds(found, batch)))
            if len(points) < 2:
                raise UserError(
                    f"`fusion`: the cost table knows {len(points)} FFN width at batch {batch}, so that a wide one cannot be "
                    "priced: build and profile narrower FFNs too, such as `puzzle build-library … --ffn 0.5,0.25` makes"
                )
            self._known[batch] = sorted(points)
        return self._known[batch]

    def is_fitted(self, batch: int) -> bool:
        """Whether T is the affine fit, for want of a width beyond the parent's."""
        return not self.engine and self.known(batch)[-1][0] <= self.own.intermediate_size

    def fit(self, batch: int) -> list[tuple[float, float]]:
        """(a, b) of T(w) = a + b·w, for prefill and for all decode steps, by least squares."""
        points = self.known(batch)
        mean = sum(w for w, _ in points) / len(points)
        spread = sum((w - mean) ** 2 for w, _ in points)
        found = []
        for phase in (0, 1):
            middle = sum(t[phase] for _, t in points) / len(points)
            slope = sum((w - mean) * (t[phase] - middle) for w, t in points) / spread
            found.append((middle - slope * mean, slope))
        return found

    def seconds(self, width: int, batch: int) -> Seconds:
        """(prefill, all decode steps) of an FFN of this width."""
        if self.engine:
            return self.costs.part_seconds(self.of(width), batch)
        points = self.known(batch)
        if self.is_fitted(batch):
            prefill, decode = (start + slope * width for start, slope in self.fit(batch))
            return prefill, decode
        at = min(max(1, bisect_left(points, (width, (-1.0, -1.0)))), len(points) - 1)
        (left, low), (right, high) = points[at - 1], points[at]
        share = (width - left) / (right - left)
        return low[0] + (high[0] - low[0]) * share, low[1] + (high[1] - low[1]) * share

    def workspace(self, width: int, batch: int) -> int:
        """Bytes that an FFN of this width works with beyond what `CostModel.workspace` has for every sub-block of the library: what
        it holds grows with its channels."""
        costs, full = self.costs, self.own.intermediate_size
        own = costs.table.workspace(self.of(full), batch, costs.work.input_len)
        if not own:
            return 0
        return max(0, math.ceil(own * width / full) + costs.stream(batch) - costs.workspace(batch))

    def change(self, widths: Sequence[int], batch: int) -> dict[str, float]:
        """What fusing FFNs of these widths adds to each resource (time, mostly below zero)."""
        whole, parts = self.seconds(sum(widths), batch), [self.seconds(width, batch) for width in widths]
        prefill, decode = (whole[phase] - sum(part[phase] for part in parts) for phase in (0, 1))
        dropped = self.own.hidden_size * (len(widths) - 1)  # the scales of all norms but one
        size = -dropped * self.costs.bytes_per_element
        return {
            "seconds": prefill + decode,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "host_seconds": prefill,  # decode steps at an engine's own pace stay as they are
            "host_decode_seconds": 0.0,
            "memory_bytes": size,
            "num_parameters": -dropped,
            "active_parameters": -dropped,
            "cached_bytes": size,
        }


@dataclass(frozen=True, slots=True)
class Fusion:
    """Prices of fusion for one library. errors [L][L]: e_ij, None without a dependency file."""

    library: Library
    errors: Rows | None = None
    source: str | None = None
    _wide: dict[CostModel, WideFfn] = field(default_factory=dict)

    @classmethod
    def open(cls, library: Library, path: Path | None) -> Fusion:
        """Raises UserError for a file that is no dependency.json of FFNs of this library's parent."""
        if path is None:
            return cls(library)
        found = read_dependency(path, library.num_layers)
        if found.ffns is None:
            raise UserError(f"{path} has no dependency of FFNs: measure the parent with `{MADE_BY}`")
        return cls(library, found.ffns.relative_error, path.name)

    def wide(self, costs: CostModel) -> WideFfn:
        if costs not in self._wide:
            self._wide[costs] = WideFfn(costs)
        return self._wide[costs]

    def charge(self, i: int, j: int) -> float:
        """Nats per token for running FFN j beside FFN i: e_ij times the score of leaving FFN j out (of the costliest
        FFN variant, in a library that has no "none")."""
        error = None if self.errors is None else self.errors[i][j]
        if error is None:
            return 0.0
        scores, spaces = self.library.scores(j), self.library.spaces[j]
        found = {name: scores.get(score_name({"ffn": name})) for name in spaces["ffn"]}
        kl = {spaces["ffn"][name]: score["kl"] for name, score in found.items() if score is not None}
        return error * kl.get(NO_OP, max(kl.values(), default=0.0))

    def pairs(
        self, layers: Sequence[tuple[str, Sequence[Cell]]], priced: Mapping[str, tuple[CostModel, int]]
    ) -> tuple[Pair, ...]:
        """Terms between neighbours. layers: label and cells of each. priced: per suffix of a workload's resources, its costs and
        batch; "" is the main one."""
        found: list[Pair] = []
        changes: dict[tuple[int, int], dict[str, float]] = {}
        for index, ((label, cells), (next_label, next_cells)) in enumerate(pairwise(layers)):
            firsts = [((label, one.name), ffn) for one in cells if one.fused and (ffn := one.lone_ffn) is not None]
            seconds = [((next_label, two.name), ffn) for two in next_cells if (ffn := two.lone_ffn) is not None]
            charge = self.charge(index, index + 1) if firsts and seconds else 0.0
            for (a, own), (b, other) in product(firsts, seconds):
                widths = (own.intermediate_size, other.intermediate_size)
                if widths not in changes:
                    changes[widths] = {
                        name + suffix: value
                        for suffix, (costs, batch) in priced.items()
                        for name, value in self.wide(costs).change(widths, batch).items()
                    }
                found.append(Pair(a=a, b=b, score=charge, resources=changes[widths]))
        return tuple(found)

    @staticmethod
    def runs(cells: Sequence[Cell]) -> list[Run]:
        """The runs of an answer, a cell a layer: a twin is fused with the next layer where that one can be."""
        found: list[Run] = []
        for index, (one, two) in enumerate(pairwise(cells)):
            if one.fused and two.lone_ffn is not None:
                first = found.pop()[0] if found and found[-1][1] == index else index
                found.append((first, index + 1))
        return found

    @staticmethod
    def widths(run: Run, cells: Sequence[Cell]) -> list[int]:
        ffns = [cell.lone_ffn for cell in cells[run[0] : run[1] + 1]]
        return [ffn.intermediate_size for ffn in ffns if ffn is not None]

    def change(self, runs: Sequence[Run], cells: Sequence[Cell], costs: CostModel, batch: int) -> dict[str, float]:
        """What all runs add to each resource, each run with the time of its whole width; to bytes also the workspace of the
        widest, which no term between neighbours has."""
        wide, every = self.wide(costs), [self.widths(run, cells) for run in runs]
        found = _sum(wide.change(widths, batch) for widths in every)
        extra = wide.workspace(max(map(sum, every)), batch) if every else 0
        more = dict.fromkeys(("memory_bytes", "cached_bytes"), extra)
        return {name: value + more.get(name, 0) for name, value in found.items()} | {"workspace_bytes": extra}

    def pairwise_error(
        self, runs: Sequence[Run], cells: Sequence[Cell], costs: CostModel, batch: int
    ) -> dict[str, float]:
        """`change` minus what the terms between neighbours add up to: above zero where the solver saw too much saved."""
        wide, every = self.wide(costs), [self.widths(run, cells) for run in runs]
        found = _sum(wide.change(two, batch) for widths in every for two in pairwise(widths))
        whole = self.change(runs, cells, costs, batch)
        return {name: whole[name] - value for name, value in found.items()}

    def summary(
        self, runs: Sequence[Run], cells: Sequence[Cell], costs: CostModel, batch: int, missed: list[str]
    ) -> dict[str, Any]:
        """How the runs were priced, for architecture.json.

        saved_seconds: of the workload, at the time of the whole width; pairwise_error_seconds: as `pairwise_error` has it;
        charge: the score that neighbours were charged; charge_all: the same over all pairs of a run; missed: limits that
        hold for the sum over neighbours but not for the whole widths.
        """
        wide = self.wide(costs)
        neighbours = [(i, i + 1) for run in runs for i in range(*run)]
        every = [(i, j) for run in runs for i in range(*run) for j in range(i + 1, run[1] + 1)]
        return {
            "wide_ffn": "engine model" if wide.engine else "affine fit" if wide.is_fitted(batch) else "cost table",
            "dependency": self.source,
            "saved_seconds": 0.0 - self.change(runs, cells, costs, batch)["seconds"],
            "pairwise_error_seconds": round(self.pairwise_error(runs, cells, costs, batch)["seconds"], 12) + 0.0,
            "charge": sum(self.charge(i, j) for i, j in neighbours),
            "charge_all": sum(self.charge(i, j) for i, j in every),
            "missed": missed,
        }


def _sum(changes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total = dict.fromkeys(CHANGED, 0.0)
    for change in changes:
        total = {name: value + change[name] for name, value in total.items()}
    return total
