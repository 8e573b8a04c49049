"""Why there is no solution, and what a looser limit would buy. Every answer comes from solving again, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from puzzle.solver.problem import Constraint, Count, Layer, Limit, Problem, Stages, Variant, exact
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve

PINS, EQUAL = "pins", "equal"  # what else can stand in the way, besides the named limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Conflict:
    """limits: the fewest that no choice meets together. nearest {limit: (side, value)}: with that one side moved to that
    value, and all else as it was, there is a solution; a limit is missing where no value of it alone would do."""

    limits: tuple[str, ...]
    nearest: dict[str, tuple[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a limit costs: the objective after moving one side of it from `value` to `moved`."""

    limit: str
    side: str
    value: float
    moved: float
    objective: float


def without(problem: Problem, dropped: set[str]) -> Problem:
    """`problem` less some of its limits, by label ("pins" and "equal" for those)."""
    return replace(
        problem,
        constraints=tuple(c for c in problem.constraints if c.label not in dropped),
        counts=tuple(c for c in problem.counts if c.label not in dropped),
        stages=None if problem.stages is None or problem.stages.label in dropped else problem.stages,
        pins={} if PINS in dropped else problem.pins,
        equal=() if EQUAL in dropped else problem.equal,
    )


def labels(problem: Problem) -> list[str]:
    """Everything that can make `problem` infeasible."""
    structure = ([PINS] if problem.pins else []) + ([EQUAL] if problem.equal else [])
    return [limit.label for limit in problem.limits] + structure


def scored_by(problem: Problem, limit: Constraint | Count, sign: float) -> Problem:
    """The same choices, scored by `sign` times the amount that `limit` bounds."""
    if isinstance(limit, Constraint):
        resource = limit.resource

        def amount(layer: str, variant: Variant) -> float:
            return sign * variant.resources[resource]

        pairs = tuple(replace(p, score=sign * p.resources.get(resource, 0.0)) for p in problem.pairs)
    else:
        cells = limit.cells

        def amount(layer: str, variant: Variant) -> float:
            return sign * ((layer, variant.name) in cells)

        pairs = tuple(replace(p, score=0.0) for p in problem.pairs)
    layers = tuple(
        Layer(name=la.name, variants=tuple(replace(v, score=amount(la.name, v)) for v in la.variants))
        for la in problem.layers
    )
    return replace(problem, layers=layers, pairs=pairs)


def least(problem: Problem, limit: Constraint | Count, side: str) -> float | None:
    """The nearest value of `limit`'s side ("min" or "max") that the rest of `problem` can meet; None when it cannot be met."""
    sign = 1.0 if side == "max" else -1.0
    found = solve(scored_by(without(problem, {limit.label}), limit, sign))
    if not found.choice:
        return None
    if isinstance(limit, Count):
        return float(sum(cell in limit.cells for cell in found.choice.items()))
    return _outward(problem.totals(found.choice)[limit.resource], sign)


def _outward(total, sign: float) -> float:
    """The float nearest to an exact total that, read as written, still admits it."""
    value = float(total)
    while sign * (exact(value) - total) < 0:
        value = math.nextafter(value, sign * math.inf)
    return value


def _sides(limit: Constraint | Count) -> list[str]:
    return [side for side in ("min", "max") if getattr(limit, side) is not None]


def _moved(problem: Problem, limit: Limit, side: str, value: float) -> Problem:
    """`problem` with one side of one limit at `value`."""
    if isinstance(limit, Stages):
        return replace(problem, stages=replace(limit, tolerance=value))
    change = {side: int(value) if isinstance(limit, Count) else value}
    return replace(
        problem,
        constraints=tuple(replace(c, **change) if c is limit else c for c in problem.constraints),  # type: ignore[arg-type]
        counts=tuple(replace(c, **change) if c is limit else c for c in problem.counts),  # type: ignore[arg-type]
    )


def explain_infeasible(problem: Problem) -> Conflict | None:
    """None when `problem` has a solution."""
    limits = smallest_conflict([problem])
    return None if limits is None else Conflict(limits=limits, nearest=nearest(problem, limits))


def smallest_conflict(problems: Sequence[Problem]) -> tuple[str, ...] | None:
    """The fewest limits that no choice of any of the problems (which share labels) meets together; None when one can be met.

    All small sets are tried, smallest first, and beyond them one that no member can leave.
    """
    every = labels(problems[0])

    def impossible(kept: Sequence[str]) -> bool:
        dropped = set(every) - set(kept)
        return all(solve(without(problem, dropped)).status == "infeasible" for problem in problems)

    if not impossible(every):
        return None
    for size in range(1, min(len(every), 3) + 1):
        for kept in combinations(every, size):
            if impossible(kept):
                return kept
    kept_so_far = every
    for label in every:
        trial = [x for x in kept_so_far if x != label]
        if impossible(trial):
            kept_so_far = trial
    return tuple(kept_so_far)


def nearest(problem: Problem, limits: Sequence[str]) -> dict[str, tuple[str, float]]:
    """As in Conflict: how far each of `limits` alone, all else kept, has to give way."""
    found: dict[str, tuple[str, float]] = {}
    for limit in problem.limits:
        if limit.label not in limits:
            continue
        if isinstance(limit, Stages):
            tolerance = _tolerance(problem, limit)
            if tolerance is not None:
                found[limit.label] = "tolerance", tolerance
            continue
        for side in _sides(limit):
            value = least(problem, limit, side)
            if value is not None and solve(_moved(problem, limit, side, value)).status != "infeasible":
                found[limit.label] = side, value
                break
    return found


def _tolerance(problem: Problem, stages: Stages) -> float | None:
    """The least tolerance, to a thousandth, under which the stages can be balanced."""
    high = float(stages.count)  # a stage holds at most everything: count times the mean
    if solve(_moved(problem, stages, "tolerance", high)).status == "infeasible":
        return None
    low = stages.tolerance
    while high - low > 1e-3:
        middle = (low + high) / 2
        if solve(_moved(problem, stages, "tolerance", middle)).status == "infeasible":
            low = middle
        else:
            high = middle
    return high


def prices(problem: Problem, solution: Solution, step: float = 0.01) -> list[Price]:
    """What moving each limit outward by `step` (1 %; a count by 1) buys: the objective of the problem solved again."""
    found = []
    for limit in (*problem.constraints, *problem.counts):
        for side in _sides(limit):
            value = float(getattr(limit, side))
            sign = 1.0 if side == "max" else -1.0
            by = 1.0 if isinstance(limit, Count) else step * (abs(value) or 1.0)
            moved = value + sign * by
            again = solve(_moved(problem, limit, side, moved))
            if again.choice:
                objective = min(again.objective, solution.objective)
                found.append(Price(limit=limit.label, side=side, value=value, moved=moved, objective=objective))
    return found
