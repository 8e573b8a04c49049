"""The best of several problems that differ in one setting, such as the batch size."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from puzzle.solver.problem import Problem
from puzzle.solver.solution import Solution
from puzzle.solver.solve import lower_bound, solve


def sweep(
    problems: Mapping[str, Problem], *, backend: str = "ortools", time_limit: float | None = None
) -> tuple[str | None, dict[str, Solution]]:
    """(label of the least objective or None, every solution by label). time_limit: seconds for all of them.

    The problem with the lowest bound goes first; what its solution proves hopeless is not solved and says "cutoff".
    """
    begin = time.monotonic()
    bounds = {label: lower_bound(problem) for label, problem in problems.items()}
    best: str | None = None
    found: dict[str, Solution] = {}
    for label in sorted(problems, key=bounds.__getitem__):
        had = math.inf if best is None else found[best].objective
        left = None if time_limit is None else max(0.01, time_limit - (time.monotonic() - begin))
        found[label] = solve(problems[label], backend, left, None if best is None else had)
        if found[label].choice and found[label].objective < had:
            best = label
    return best, {label: found[label] for label in problems}
