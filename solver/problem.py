"""The selection problem: one variant per layer, least total score, everything within limits. The data, and exact sums.

Data: the fields of `Problem`, whose names stand below. A cell is a (layer, variant). score[cell] and resources[cell][r]
are those of the layer's variant; pair.score and pair.resources[r] are added when both of its cells are chosen, fixed[r]
always.

Variables
    x[cell] in {0, 1}       the layer takes the variant; `choice` {layer: variant} names the cells where x is 1
    y[pair] in {0, 1}       both pair.a and pair.b are chosen
    end[0..stages.count]    whole numbers: stage n holds the layers from end[n - 1] up to, without, end[n]

Formulation
    min   Σ_cell score[cell] x[cell] + Σ_pair pair.score y[pair]
    s.t.  Σ_variant x[layer, variant] = 1                                  every layer
          y[pair] = x[pair.a] x[pair.b]                                    every pair of `pairs`
          c.min <= total[c.resource] <= c.max                              every c of `constraints`, where
              total[r] = fixed[r] + Σ_cell resources[cell][r] x[cell] + Σ_pair pair.resources[r] y[pair]
          count.min <= Σ_{cell in count.cells} x[cell] <= count.max        every count of `counts`
          x[layer, variant] = 0                                            layers of `pins`, variants not in pins[layer]
          x[layer, variant] = x[other, variant]                            layers of one group of `equal`, every variant
          0 = end[0] < end[1] < ... < end[stages.count] = number of layers
          (1 - stages.tolerance) mean <= load[n] <= (1 + stages.tolerance) mean   every stage n, where
              load[n] = Σ_{cells of stage n} resources[cell][stages.resource] x[cell], mean = Σ_n load[n] / stages.count
What names `end` and `load` holds where `stages` is given. A side of a limit that is None is left out; a resource that a
pair or `fixed` does not name is 0 there. `solver/linear.py` writes products and stages as linear rows; `Problem.totals`
and `Problem.violated` are the formulation, executed.

Numbers are read as written: 0.1 is one tenth, not the binary fraction nearest to it. Sums are exact, so ten times 0.1
meets a limit of 1.

Four layers and a head of 1 second that take 17 seconds, to be brought to 13: dropping L1 costs least, unless the pair, the
count, the pin, the group or the stages have a say.

    >>> from puzzle.solver import Constraint, Count, Layer, Pair, Problem, Stages, Variant, solve
    >>> def layer(name, half, none):
    ...     scored = (("full", 0.0, 4), ("half", half, 2), ("none", none, 0))
    ...     return Layer(
    ...         name=name, variants=tuple(Variant(name=n, score=s, resources={"seconds": r}) for n, s, r in scored)
    ...     )
    >>> layers = layer("L0", 5.0, 9.0), layer("L1", 2.0, 3.0), layer("L2", 2.0, 3.5), layer("L3", 4.0, 8.0)
    >>> def least(**more):
    ...     limit = Constraint(resource="seconds", max=13)
    ...     found = solve(Problem(layers=layers, constraints=(limit,), fixed={"seconds": 1}, **more))
    ...     return found.objective, " ".join(found.choice.values())
    >>> least()
    (3.0, 'full none full full')
    >>> least(pairs=(Pair(a=("L1", "half"), b=("L2", "half"), score=-2.0),))
    (2.0, 'full half half full')
    >>> least(counts=(Count(name="halves", cells=frozenset((la.name, "half") for la in layers), min=1),))
    (4.0, 'full half half full')
    >>> least(pins={"L1": ("full", "half")})
    (3.5, 'full full none full')
    >>> least(equal=(("L1", "L2"),))
    (4.0, 'full half half full')
    >>> least(stages=Stages(resource="seconds", count=2, tolerance=0.0))
    (4.0, 'full half half full')
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, Inexact
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import chain

from puzzle.base.errors import UserError

Cell = tuple[str, str]  # (layer, variant)
NUMBERS = {int, float}


class ProblemError(UserError):
    """The problem's data are unusable: one line with the cell, its value and the fix."""


# Of more digits than from a double's last to the first of the largest, so that no sum of them is rounded.
EXACTLY = Context(prec=1000, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[Inexact])


@lru_cache(maxsize=1 << 18)
def _written(value: float) -> Decimal:
    return Decimal(value) if isinstance(value, int) else Decimal(repr(float(value)))


@lru_cache(maxsize=1 << 18)
def exact(value: float) -> Fraction:
    """The number as it is written in decimal."""
    return Fraction(_written(value))


def exact_sum(values: Iterable[float]) -> Fraction:
    """Of the numbers as they are written."""
    return Fraction(reduce(EXACTLY.add, map(_written, values), Decimal(0)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    name: str
    score: float
    resources: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Checked when it is made, and not again in every problem that has it. Raises ProblemError for no variants, for two of one name,
    and for a number that is none, naming the cell."""

    name: str
    variants: tuple[Variant, ...]
    resources: Set[str] = field(init=False, repr=False, compare=False)  # that all variants have

    def __post_init__(self) -> None:
        if not self.variants:
            raise ProblemError(f"layer {self.name} has no variants: give at least one")
        _unique((v.name for v in self.variants), f"variant of layer {self.name}")
        amounts = [v.resources for v in self.variants]
        if not _are_finite([*(v.score for v in self.variants), *chain.from_iterable(a.values() for a in amounts)]):
            for variant in self.variants:
                _all_finite(f"layer {self.name} variant {variant.name}", variant.score, variant.resources)
        object.__setattr__(self, "resources", set(amounts[0]).intersection(*amounts))


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

    Raises ProblemError for missing, duplicate, NaN or infinite data beside what `Layer` checks, naming the cell.
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
        return [r for r in first if all(r in layer.resources for layer in self.layers)]

    def chosen(self, choice: Mapping[str, str]) -> list[Variant]:
        """The variants that `choice` {layer: variant} names, layer by layer."""
        return [next(v for v in layer.variants if v.name == choice[layer.name]) for layer in self.layers]

    def totals(self, choice: Mapping[str, str]) -> dict[str, Fraction]:
        """Exact totals of every resource and of "score"."""
        picked = self.chosen(choice)
        active = [p for p in self.pairs if choice[p.a[0]] == p.a[1] and choice[p.b[0]] == p.b[1]]
        sums = {}
        for resource in self.resources:
            amounts = [self.fixed.get(resource, 0), *(v.resources[resource] for v in picked)]
            sums[resource] = exact_sum([*amounts, *(p.resources.get(resource, 0) for p in active)])
        return sums | {"score": exact_sum([*(v.score for v in picked), *(p.score for p in active)])}

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
    for layer in problem.layers:
        for lacking in wanted - layer.resources:
            variant = next(v for v in layer.variants if lacking not in v.resources)
            raise ProblemError(
                f"layer {layer.name} variant {variant.name} has no {lacking}: every variant needs each limited resource"
            )
    names = {layer.name: {v.name for v in layer.variants} for layer in problem.layers}
    for pair in problem.pairs:
        where = f"pair {'/'.join(pair.a)} and {'/'.join(pair.b)}"
        for layer_name, variant_name in (pair.a, pair.b):
            if variant_name not in names.get(layer_name, ()):
                raise ProblemError(f"{where}: there is no variant {variant_name} of layer {layer_name}")
        if pair.a[0] == pair.b[0]:
            raise ProblemError(f"{where}: a pair joins two different layers")
        if not _are_finite((pair.score, *pair.resources.values())):
            _all_finite(where, pair.score, pair.resources)
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
    every = list(names)
    if len(set(every)) < len(every):
        twice = next(name for n, name in enumerate(every) if name in every[:n])
        raise ProblemError(f"two things are called {what} '{twice}': names must differ")


def _are_finite(values: Collection[float]) -> bool:
    """The quick answer; a number of another type, such as one of numpy's, is for `_finite`."""
    return NUMBERS.issuperset(map(type, values)) and all(map(math.isfinite, values))


def _all_finite(where: str, score: float, resources: Mapping[str, float]) -> None:
    for what, value in (("score", score), *resources.items()):
        _finite(value, where, what)


def _finite(value: float, where: str, what: str) -> None:
    # bool is an int for Python, and nobody's number
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ProblemError(f"{where} {what} is {value!r}: it must be a finite number")
    if not math.isfinite(value):
        raise ProblemError(f"{where} {what} is {value!r}: it must be a finite number")
