"""The selection problem: one variant per layer, least total score, everything within limits. The data, and exact sums.

Data: layers i with variants j, score s_ij and resources r_ijk; pairs p = ((i, j), (i', j')) whose score and resources are
added when both ends are chosen; fixed amounts f_k of what no choice changes. Variables: the choice x(i).
Limits: lo_k <= f_k + Σ_i r_{i,x(i),k} + Σ_{active p} r_pk <= hi_k; counts of layers that take one of some variants; pins;
groups of layers that choose alike; contiguous pipeline stages of balanced load. Objective: the summed score, minimised.

Numbers are read as written: 0.1 is one tenth, not the binary fraction nearest to it. Sums are exact, so ten times 0.1
meets a limit of 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

Cell = tuple[str, str]  # (layer, variant)


class ProblemError(ValueError):
    """The problem's data are unusable: one line with the cell, its value and the fix."""


@lru_cache(maxsize=1 << 18)
def exact(value: float) -> Fraction:
    """The number as it is written in decimal."""
    return Fraction(value) if isinstance(value, int) else Fraction(repr(float(value)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    name: str
    score: float
    resources: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    name: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """min <= total of `resource` <= max; None leaves a side open. name: how messages call it."""

    resource: str
    min: float | None = None
    max: float | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        return self.name or self.resource


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """min <= number of layers whose choice is among `cells` <= max ("at least 8 layers keep attention")."""

    name: str
    cells: frozenset[Cell]
    min: int | None = None
    max: int | None = None

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """What is added when both cells are chosen: an interaction of scores, a saving when neighbours fuse."""

    a: Cell
    b: Cell
    score: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """The layers are cut into `count` contiguous stages; each one's total of `resource` is within `tolerance` of their mean
    (0.05 is 5 %). Pairs and fixed amounts do not count."""

    resource: str
    count: int
    tolerance: float
    name: str = "stages"

    @property
    def label(self) -> str:
        return self.name


Limit = Constraint | Count | Stages


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """pins {layer: the variants it may take}; equal: groups of layers that take variants of the same name.

    Raises ProblemError for missing, duplicate, NaN or infinite data, naming the cell.
    """

    layers: tuple[Layer, ...]
    constraints: tuple[Constraint, ...] = ()
    counts: tuple[Count, ...] = ()
    pairs: tuple[Pair, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    pins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    equal: tuple[tuple[str, ...], ...] = ()
    stages: Stages | None = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def limits(self) -> tuple[Limit, ...]:
        return (*self.constraints, *self.counts, *((self.stages,) if self.stages else ()))

    @property
    def resources(self) -> list[str]:
        """Names that every variant has, in the order of the first."""
        first = self.layers[0].variants[0].resources
        return [r for r in first if all(r in v.resources for layer in self.layers for v in layer.variants)]

    def chosen(self, choice: Mapping[str, str]) -> list[Variant]:
        """The variants that `choice` {layer: variant} names, layer by layer."""
        return [next(v for v in layer.variants if v.name == choice[layer.name]) for layer in self.layers]

    def totals(self, choice: Mapping[str, str]) -> dict[str, Fraction]:
        """Exact totals of every resource and of "score"."""
        picked = self.chosen(choice)
        active = [p for p in self.pairs if choice[p.a[0]] == p.a[1] and choice[p.b[0]] == p.b[1]]
        sums = {}
        for resource in self.resources:
            total = exact(self.fixed.get(resource, 0)) + sum(exact(v.resources[resource]) for v in picked)
            sums[resource] = total + sum(exact(p.resources.get(resource, 0)) for p in active)
        scores = [v.score for v in picked] + [p.score for p in active]
        sums["score"] = sum(map(exact, scores), Fraction(0))
        return sums

    def violated(self, choice: Mapping[str, str]) -> list[str]:
        """Labels of what `choice` breaks, in exact arithmetic; "pin" and "equal" for those."""
        totals = self.totals(choice)
        broken = [c.label for c in self.constraints if not _within(totals[c.resource], c.min, c.max)]
        for count in self.counts:
            number = Fraction(sum((layer, variant) in count.cells for layer, variant in choice.items()))
            if not _within(number, count.min, count.max):
                broken.append(count.label)
        if any(choice[layer] not in allowed for layer, allowed in self.pins.items()):
            broken.append("pin")
        if any(len({choice[layer] for layer in group}) > 1 for group in self.equal):
            broken.append("equal")
        if self.stages is not None and self.stage_ends(choice) is None:
            broken.append(self.stages.label)
        return broken

    def stage_ends(self, choice: Mapping[str, str]) -> list[int] | None:
        """Where each stage ends (layer counts, the last is all of them) so that loads are balanced; None when impossible."""
        assert self.stages is not None
        loads = [exact(v.resources[self.stages.resource]) for v in self.chosen(choice)]
        total = sum(loads, Fraction(0))
        mean, spread = total / self.stages.count, exact(self.stages.tolerance)
        low, high = mean * (1 - spread), mean * (1 + spread)
        prefix = [Fraction(0)]
        for load in loads:
            prefix.append(prefix[-1] + load)
        reachable: list[dict[int, int]] = [{0: -1}]  # per stage: {end: the end before it}
        for _ in range(self.stages.count):
            ends: dict[int, int] = {}
            for begin in reachable[-1]:
                for end in range(begin + 1, len(prefix)):
                    if low <= prefix[end] - prefix[begin] <= high:
                        ends.setdefault(end, begin)
            reachable.append(ends)
        if len(loads) not in reachable[-1]:
            return None
        found = [len(loads)]
        for ends in reversed(reachable[2:]):
            found.append(ends[found[-1]])
        return found[::-1]


def _within(total: Fraction, low: float | None, high: float | None) -> bool:
    return (low is None or total >= exact(low)) and (high is None or total <= exact(high))


def check(problem: Problem) -> None:
    """Raise ProblemError unless the data are complete and finite."""
    if not problem.layers:
        raise ProblemError("the problem has no layers: give at least one")
    _unique((layer.name for layer in problem.layers), "layer")
    _unique((limit.label for limit in problem.limits), "constraint")
    wanted = {c.resource for c in problem.constraints}
    if problem.stages is not None:
        wanted.add(problem.stages.resource)
        if not 1 <= problem.stages.count <= len(problem.layers):
            raise ProblemError(f"{problem.stages.count} stages of {len(problem.layers)} layers: use 1 to that many")
        if not 0 <= problem.stages.tolerance < math.inf:
            raise ProblemError(
                f"stage tolerance {problem.stages.tolerance!r}: must be a number from 0 up, such as 0.05"
            )
    names: dict[str, set[str]] = {}
    for layer in problem.layers:
        if not layer.variants:
            raise ProblemError(f"layer {layer.name} has no variants: give at least one")
        _unique((v.name for v in layer.variants), f"variant of layer {layer.name}")
        names[layer.name] = {v.name for v in layer.variants}
        for variant in layer.variants:
            where = f"layer {layer.name} variant {variant.name}"
            _finite(variant.score, where, "score")
            for resource, value in variant.resources.items():
                _finite(value, where, resource)
            for resource in wanted:
                if resource not in variant.resources:
                    raise ProblemError(f"{where} has no {resource}: every variant needs each limited resource")
    for pair in problem.pairs:
        where = f"pair {'/'.join(pair.a)} and {'/'.join(pair.b)}"
        for layer_name, variant_name in (pair.a, pair.b):
            if variant_name not in names.get(layer_name, ()):
                raise ProblemError(f"{where}: there is no variant {variant_name} of layer {layer_name}")
        if pair.a[0] == pair.b[0]:
            raise ProblemError(f"{where}: a pair joins two different layers")
        _finite(pair.score, where, "score")
        for resource, value in pair.resources.items():
            _finite(value, where, resource)
    for resource, value in problem.fixed.items():
        _finite(value, "fixed", resource)
    sides = [(c.label, side) for c in problem.constraints for side in (c.min, c.max)]
    sides += [(c.label, side) for c in problem.counts for side in (c.min, c.max)]
    for label, side in sides:
        if side is not None:
            _finite(side, "limit", label)
    for layer_name, allowed in problem.pins.items():
        if layer_name not in names:
            raise ProblemError(f"pin: there is no layer {layer_name}")
        if not allowed or not set(allowed) <= names[layer_name]:
            raise ProblemError(
                f"pin of layer {layer_name}: {', '.join(allowed) or 'nothing'} is not among its variants"
            )
    for group in problem.equal:
        for layer_name in group:
            if layer_name not in names:
                raise ProblemError(f"equal: there is no layer {layer_name}")


def _unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ProblemError(f"two things are called {what} '{name}': names must differ")
        seen.add(name)


def _finite(value: float, where: str, what: str) -> None:
    # bool is an int for Python, and nobody's number
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ProblemError(f"{where} {what} is {value!r}: it must be a finite number")
    if not math.isfinite(value):
        raise ProblemError(f"{where} {what} is {value!r}: it must be a finite number")
