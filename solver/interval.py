"""The best of problems that are numbered, such as by batch size: branch and bound over stretches of the numbers.

A relaxed problem for the numbers from `low` to `high` has no choice costlier than any of theirs. The stretch of the lowest
bound is halved until it is one number, whose problem is solved; what is left when no bound is below the best score is not
looked at, and could not be better.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from puzzle.solver.problem import Constraint, Layer, Problem, Variant
from puzzle.solver.solution import Solution
from puzzle.solver.solve import lower_bound, solve


def best_between(
    ends: Sequence[int],
    problem: Callable[[int], Problem],
    relaxed: Callable[[int, int], Problem],
    *,
    backend: str = "ortools",
    time_limit: float | None = None,
    cutoff: float = math.inf,
) -> tuple[int | None, dict[int, Solution]]:
    """(number of the least objective or None, the solutions of all that were solved). time_limit: seconds for all of them.
    cutoff: nothing that is not below it is looked for.

    ends: rising numbers; the first stretches end before each. relaxed(low, high): a problem that every choice of the problems
    low to high (which cross no end) meets, at no higher score.
    """
    begin, best = time.monotonic(), None
    found: dict[int, Solution] = {}
    stretches: list[tuple[float, int, int]] = []

    def add(low: int, high: int) -> None:
        bound = lower_bound(relaxed(low, high))
        if bound < math.inf:
            heapq.heappush(stretches, (bound, low, high))

    for low, after in pairwise((*ends, ends[-1] + 1)):
        add(low, after - 1)
    while stretches:
        bound, low, high = heapq.heappop(stretches)
        had = cutoff if best is None else found[best].objective
        left = None if time_limit is None else time_limit - (time.monotonic() - begin)
        if bound >= had or (left is not None and left <= 0 and found):
            break
        if low < high:
            middle = (low + high) // 2
            add(low, middle)
            add(middle + 1, high)
            continue
        known = None if had == math.inf else had
        found[low] = solve(problem(low), backend, None if left is None else max(0.01, left), known)
        if found[low].choice and found[low].objective < had:
            best = low
    return best, found


def relaxed_between(one: Problem, other: Problem, fixed: Mapping[str, float]) -> Problem:
    """A problem that every choice of `one`, `other` and those numbered between them meets, for `best_between`.

    The two differ in amounts and upper limits alone. Each limit becomes a resource of its own, called by its place: the amount as
    a share of the limit, where it is smaller. That bounds those between where amounts are linear in the number, and limits linear
    through 0 or constant: shares are monotone then. fixed {place: the least share that no choice changes}. Stages are dropped.
    """
    limits = list(zip(one.constraints, other.constraints, strict=True))

    known: dict[tuple[int, int], dict[str, float]] = {}

    def least(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        """Of what many cells may share, once."""
        if (id(a), id(b)) not in known:
            known[id(a), id(b)] = {
                str(n): min(a.get(x.resource, 0.0) / most(x), b.get(y.resource, 0.0) / most(y))
                for n, (x, y) in enumerate(limits)
            }
        return known[id(a), id(b)]

    layers = tuple(
        Layer(
            name=la.name,
            variants=tuple(
                Variant(name=v.name, score=v.score, resources=least(v.resources, w.resources))
                for v, w in zip(la.variants, lb.variants, strict=True)
            ),
        )
        for la, lb in zip(one.layers, other.layers, strict=True)
    )
    pairs = tuple(
        replace(p, resources=least(p.resources, q.resources)) for p, q in zip(one.pairs, other.pairs, strict=True)
    )
    constraints = tuple(replace(c, resource=str(n), max=1.0) for n, (c, _) in enumerate(limits))
    return replace(one, layers=layers, pairs=pairs, constraints=constraints, fixed=fixed, stages=None)


def most(limit: Constraint) -> float:
    """The upper side, which every limit here has."""
    assert limit.max is not None
    return limit.max
