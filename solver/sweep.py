"""The best of several problems that differ in one setting, such as the batch size."""

from __future__ import annotations

from collections.abc import Mapping

from puzzle.solver.problem import Problem
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve


def sweep(
    problems: Mapping[str, Problem], *, backend: str = "ortools", time_limit: float | None = None
) -> tuple[str | None, dict[str, Solution]]:
    """(label of the least objective or None, every solution by label). time_limit: seconds for each problem."""
    solutions = {label: solve(problem, backend, time_limit) for label, problem in problems.items()}
    feasible = [label for label, solution in solutions.items() if solution.choice]
    return (min(feasible, key=lambda label: solutions[label].objective) if feasible else None), solutions
