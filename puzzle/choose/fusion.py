"""`puzzle solve --fusion`: what it saves, and what it costs, that neighbouring FFNs become one. Needs no torch.

Every variant pair without attention and with a SwiGLU of width w gets a twin, its name with a "+": the same layer, fused
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
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.choose.cost_model import CostModel
from puzzle.fuse.matrix import MADE_BY, Rows, read_dependency
from puzzle.fuse.runs import Run
from puzzle.library.manifest import PARENT, Library
from puzzle.profile.engine import EngineModel
from puzzle.solver.problem import Layer, Pair, Variant
from puzzle.solver.solution import Solution

PLUS = "+"
_SHAPE = re.compile(r"h(\d+) f(\d+)(\+bias)?")
CHANGED = ("seconds", "prefill_seconds", "decode_seconds", "memory_bytes", "num_parameters", "cached_bytes")
Seconds = tuple[float, float]  # prefill, all decode steps
Choices = Sequence[Mapping[str, str]]  # {"attention": name, "ffn": name} per layer


def ffn_width(library: Library, name: str) -> int | None:
    """Channels of an FFN variant; None for one that is no SwiGLU."""
    found = _SHAPE.fullmatch(library.variant("ffn", name)["shape"])
    return int(found[2]) if found else None


class WideFfn:
    """Seconds of FFNs by width in one workload, of one cost model."""

    def __init__(self, costs: CostModel):
        self.costs = costs
        own = _SHAPE.fullmatch(costs.library.variant("ffn", PARENT)["shape"])
        if own is None:
            raise UserError(
                f"--fusion: the parent's FFN '{costs.library.variant('ffn', PARENT)['shape']}' is no SwiGLU"
            )
        self.hidden_size, self.parent_width, self.suffix = int(own[1]), int(own[2]), own[3] or ""
        self._known: dict[int, list[tuple[int, Seconds]]] = {}

    @property
    def engine(self) -> bool:
        return isinstance(self.costs.table, EngineModel)

    def shape(self, width: int) -> str:
        return f"h{self.hidden_size} f{width}{self.suffix}"

    def known(self, batch: int) -> list[tuple[int, Seconds]]:
        """Measured points (width, seconds), by width. Raises UserError for fewer than two."""
        if batch not in self._known:
            points = []
            for text in self.costs.table.shapes("ffn"):  # type: ignore[union-attr]
                found = _SHAPE.fullmatch(text)
                if found and int(found[1]) == self.hidden_size and (found[3] or "") == self.suffix:
                    points.append((int(found[2]), self.costs.part_seconds("ffn", text, batch)))
            if len(points) < 2:
                raise UserError(
                    f"--fusion: the cost table knows {len(points)} FFN width at batch {batch}, so that a wide one cannot be "
                    "priced: build and profile narrower FFNs too, such as --ffn 0.5,0.25"
                )
            self._known[batch] = sorted(points)
        return self._known[batch]

    def is_fitted(self, batch: int) -> bool:
        """Whether T is the affine fit, for want of a width beyond the parent's."""
        return not self.engine and self.known(batch)[-1][0] <= self.parent_width

    def fit(self, batch: int) -> tuple[Seconds, Seconds]:
        """(a, b) of T(w) = a + b·w, for both phases, by least squares."""
        points = self.known(batch)
        mean = sum(w for w, _ in points) / len(points)
        spread = sum((w - mean) ** 2 for w, _ in points)
        found = []
        for phase in (0, 1):
            middle = sum(t[phase] for _, t in points) / len(points)
            slope = sum((w - mean) * (t[phase] - middle) for w, t in points) / spread
            found.append((middle - slope * mean, slope))
        (a, b), (c, d) = found
        return (a, c), (b, d)

    def seconds(self, width: int, batch: int) -> Seconds:
        """(prefill, all decode steps) of an FFN of this width."""
        if self.engine:
            return self.costs.part_seconds("ffn", self.shape(width), batch)
        points = self.known(batch)
        if self.is_fitted(batch):
            start, slope = self.fit(batch)
            return start[0] + slope[0] * width, start[1] + slope[1] * width
        at = min(max(1, bisect_left(points, (width, (-1.0, -1.0)))), len(points) - 1)
        (left, low), (right, high) = points[at - 1], points[at]
        share = (width - left) / (right - left)
        return low[0] + (high[0] - low[0]) * share, low[1] + (high[1] - low[1]) * share

    def workspace(self, width: int, batch: int) -> int:
        """Bytes that an FFN of this width works with beyond what `CostModel.workspace` has for every sub-block of the library: what
        it holds grows with its channels."""
        costs = self.costs
        own = costs.table.workspace("ffn", self.shape(self.parent_width), batch, costs.work.input_len)
        return (
            max(0, math.ceil(own * width / self.parent_width) + costs.stream(batch) - costs.workspace(batch))
            if own
            else 0
        )

    def change(self, widths: Sequence[int], batch: int) -> dict[str, float]:
        """What fusing FFNs of these widths adds to each resource (time, mostly below zero)."""
        whole, parts = self.seconds(sum(widths), batch), [self.seconds(width, batch) for width in widths]
        prefill, decode = (whole[phase] - sum(part[phase] for part in parts) for phase in (0, 1))
        dropped = self.hidden_size * (len(widths) - 1)  # the scales of all norms but one
        size = -dropped * self.costs.bytes_per_element
        return {
            "seconds": prefill + decode,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "memory_bytes": size,
            "num_parameters": -dropped,
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

    def width(self, name: str) -> int | None:
        """Channels of a pair "attention|ffn" that can be fused; None for others."""
        attention, ffn = name.removesuffix(PLUS).split("|")
        return ffn_width(self.library, ffn) if self.library.variant("attention", attention)["shape"] == "none" else None

    def charge(self, i: int, j: int) -> float:
        """Nats per token for running FFN j beside FFN i: e_ij times the score of leaving FFN j out (of the costliest
        FFN variant, in a library that has no "none")."""
        error = None if self.errors is None else self.errors[i][j]
        if error is None:
            return 0.0
        scores = {name: found["kl"] for name, found in self.library.scores(j).items() if name.startswith("ffn/")}
        return error * scores.get("ffn/none", max(scores.values(), default=0.0))

    def twins(self, layer: Layer) -> Layer:
        """The layer with a twin of every variant that can be fused."""
        able = [v for v in layer.variants if self.width(v.name)]
        twins = (Variant(name=v.name + PLUS, score=v.score, resources=v.resources) for v in able)
        return Layer(name=layer.name, variants=(*layer.variants, *twins))

    def pairs(self, layers: Sequence[Layer], priced: Mapping[str, tuple[CostModel, int]]) -> tuple[Pair, ...]:
        """Terms between neighbours. priced: per suffix of a workload's resources, its costs and batch; "" is the main one."""
        found: list[Pair] = []
        changes: dict[tuple[int, int], dict[str, float]] = {}
        for index in range(len(layers) - 1):
            charge: float | None = None
            for one in layers[index].variants:
                if not one.name.endswith(PLUS):
                    continue
                for two in layers[index + 1].variants:
                    own, other = self.width(one.name), self.width(two.name)
                    if not own or not other:
                        continue
                    if (own, other) not in changes:
                        changes[own, other] = self._change((own, other), priced)
                    charge = self.charge(index, index + 1) if charge is None else charge
                    a, b = (layers[index].name, one.name), (layers[index + 1].name, two.name)
                    found.append(Pair(a=a, b=b, score=charge, resources=changes[own, other]))
        return tuple(found)

    def _change(self, widths: Sequence[int], priced: Mapping[str, tuple[CostModel, int]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for suffix, (costs, batch) in priced.items():
            change = self.wide(costs).change(widths, batch)
            found |= {name + suffix: value for name, value in change.items()}
        return found

    def runs(self, solution: Solution) -> list[Run]:
        """The runs of a solution: a twin is fused with the next layer where that one can be."""
        names = [solution.choice[layer] for layer in sorted(solution.choice)]
        found: list[Run] = []
        for index in range(len(names) - 1):
            if names[index].endswith(PLUS) and self.width(names[index + 1]):
                first = found.pop()[0] if found and found[-1][1] == index else index
                found.append((first, index + 1))
        return found

    def widths(self, run: Run, layers: Choices) -> list[int]:
        return [ffn_width(self.library, layers[index]["ffn"]) or 0 for index in range(run[0], run[1] + 1)]

    def change(self, runs: Sequence[Run], layers: Choices, costs: CostModel, batch: int) -> dict[str, float]:
        """What all runs add to each resource, each run with the time of its whole width; to bytes also the workspace of the
        widest, which no term between neighbours has."""
        wide, every = self.wide(costs), [self.widths(run, layers) for run in runs]
        found = _sum(wide.change(widths, batch) for widths in every)
        extra = wide.workspace(max(map(sum, every)), batch) if every else 0
        more = dict.fromkeys(("memory_bytes", "cached_bytes"), extra)
        return {name: value + more.get(name, 0) for name, value in found.items()} | {"workspace_bytes": extra}

    def pairwise_error(self, runs: Sequence[Run], layers: Choices, costs: CostModel, batch: int) -> dict[str, float]:
        """`change` minus what the terms between neighbours add up to: above zero where the solver saw too much saved."""
        wide, every = self.wide(costs), [self.widths(run, layers) for run in runs]
        found = _sum(wide.change(two, batch) for widths in every for two in pairwise(widths))
        whole = self.change(runs, layers, costs, batch)
        return {name: whole[name] - value for name, value in found.items()}

    def summary(
        self, runs: Sequence[Run], layers: Choices, costs: CostModel, batch: int, missed: list[str]
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
            "saved_seconds": 0.0 - self.change(runs, layers, costs, batch)["seconds"],
            "pairwise_error_seconds": round(self.pairwise_error(runs, layers, costs, batch)["seconds"], 12) + 0.0,
            "charge": sum(self.charge(i, j) for i, j in neighbours),
            "charge_all": sum(self.charge(i, j) for i, j in every),
            "missed": missed,
        }


def _sum(changes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total = dict.fromkeys(CHANGED, 0.0)
    for change in changes:
        total = {name: value + change[name] for name, value in total.items()}
    return total
