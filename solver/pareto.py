"""The frontier of score against one limit: the exact optimum at each of many values of that limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from puzzle.solver.explain import least, without
from puzzle.solver.problem import Constraint, Problem, ProblemError
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve
from puzzle.solver.sweep import sweep

LIMIT = "frontier"  # the label of the limit that moves


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """The optimum at one value of the limit. label: which of several problems (batch sizes) it comes from."""

    value: float
    label: str
    solution: Solution


def frontier(
    values: Sequence[float],
    problems_at: Callable[[float], Mapping[str, Problem]],
    *,
    backend: str = "ortools",
    time_limit: float | None = None,
    on_point: Callable[[Point], None] = lambda _: None,
) -> list[Point]:
    """A point for every value that can be met. problems_at: the problems to sweep (by batch size) at a value of the limit.

    on_point is called as each is found, so that a caller can keep them and later go on with the values that remain.
    """
    found = []
    for value in values:
        label, solutions = sweep(problems_at(value), backend=backend, time_limit=time_limit)
        if label is not None:
            found.append(Point(value=value, label=label, solution=solutions[label]))
            on_point(found[-1])
    return found


def limited(problem: Problem, resource: str) -> Callable[[float], Mapping[str, Problem]]:
    """`problem` with its total of `resource` at most a value, for `frontier`."""
    rest = without(problem, {LIMIT})

    def at(value: float) -> Mapping[str, Problem]:
        limit = Constraint(resource=resource, max=value, name=LIMIT)
        return {"": replace(rest, constraints=(*rest.constraints, limit))}

    return at


def span(problem: Problem, resource: str, count: int) -> list[float]:
    """`count` values of `resource`, evenly from the least that any choice takes to what the unlimited optimum takes.

    Raises ProblemError when the problem has no solution, or for less than two values.
    """
    if count < 2:
        raise ProblemError(f"{count} points of a frontier: ask for at least 2")
    limit = Constraint(resource=resource, name=LIMIT)
    best = solve(problem)
    low = least(replace(problem, constraints=(*problem.constraints, limit)), limit, "max")
    if low is None or not best.choice:
        raise ProblemError("the problem has no solution, so there is no frontier: relax its constraints")
    high = max(low, best.totals[resource])
    return [low + (high - low) * n / (count - 1) for n in range(count)]
