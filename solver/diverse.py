"""Several good choices that differ: each is optimal given that it differs from all earlier ones in enough layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from puzzle.solver.problem import Count, Problem, ProblemError
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve


def apart(problem: Problem, earlier: Sequence[Solution], min_distance: int) -> Problem:
    """`problem` with choices at least `min_distance` layers away from each earlier solution."""
    most = len(problem.layers) - min_distance
    counts = tuple(
        Count(name=f"distance to solution {n}", cells=frozenset(s.choice.items()), max=most)
        for n, s in enumerate(earlier, 1)
    )
    return replace(problem, counts=(*problem.counts, *counts))


def diverse(
    problem: Problem,
    count: int,
    min_distance: int,
    *,
    backend: str = "ortools",
    time_limit: float | None = None,
    earlier: Sequence[Solution] = (),
    on_found: Callable[[Solution], None] = lambda _: None,
) -> list[Solution]:
    """Up to `count` solutions, fewer when there are no more; their objectives never fall. time_limit: seconds for each.

    earlier: solutions already had, to continue from. on_found is called with every new one. Raises ProblemError for a
    distance that no two choices can have.
    """
    if count < 1:
        raise ProblemError(f"{count} diverse solutions: ask for at least 1")
    if not 1 <= min_distance <= len(problem.layers):
        raise ProblemError(f"a distance of {min_distance} layers: use 1 to {len(problem.layers)}, the number of layers")
    found = list(earlier)
    while len(found) < count:
        solution = solve(apart(problem, found, min_distance), backend, time_limit)
        if not solution.choice:
            break
        found.append(solution)
        on_found(solution)
    return found
