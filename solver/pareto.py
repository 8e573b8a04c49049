"""The frontier of score against one limit: the exact optimum at each of many values of that limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from puzzle.solver.problem import Problem
from puzzle.solver.solution import Solution
from puzzle.solver.sweep import sweep


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
