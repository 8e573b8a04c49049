"""Several good choices that differ: each is optimal given that it differs from all earlier ones in enough layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from puzzle.solver.problem import Count, Problem, ProblemError
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve


def apart(problem: Problem, earlier: Sequence[frozenset[tuple[str, str]]], min_distance: int) -> Problem:
    """`problem` with choices at least `min_distance` layers away from each earlier one, of (layer, variant)."""
    most = len(problem.layers) - min_distance
    counts = tuple(Count(name=f"distance to solution {n}", cells=cells, max=most) for n, cells in enumerate(earlier, 1))
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
    _check(problem, min_distance)
    found = list(earlier)
    while len(found) < count:
        cells = [frozenset(one.choice.items()) for one in found]
        solution = solve(apart(problem, cells, min_distance), backend, time_limit)
        if not solution.choice:
            break
        found.append(solution)
        on_found(solution)
    return found


def diverse_over(
    problems: Mapping[int, Problem],
    best: Mapping[int, Solution],
    count: int,
    min_distance: int,
    *,
    backend: str = "ortools",
    time_limit: float | None = None,
    on_found: Callable[[], object] = lambda: None,
) -> list[tuple[int, Solution]]:
    """The same over problems that differ in a setting, such as the batch size, with the setting of each: every one is the best of all
    that differ from all earlier ones. Variants of a layer that have the same score, to the last bit, count as one: on the text they do
    the same. best: the solutions of the problems. Raises ProblemError as `diverse` does."""
    found: list[tuple[int, Solution]] = []
    earlier: list[frozenset[tuple[str, str]]] = []
    upcoming = {number: solution for number, solution in best.items() if solution.choice}
    while upcoming and len(found) < count:
        at = min(upcoming, key=lambda number: upcoming[number].objective)
        _check(problems[at], min_distance)
        found.append((at, upcoming[at]))
        on_found()
        earlier.append(_alike(problems[at], upcoming[at]))
        for number, waiting in list(upcoming.items()):
            if len(waiting.choice.items() - earlier[-1]) < min_distance and len(found) < count:
                again = solve(apart(problems[number], earlier, min_distance), backend, time_limit)
                upcoming |= {number: again}
                if not again.choice:
                    del upcoming[number]
    return found


def _alike(problem: Problem, solution: Solution) -> frozenset[tuple[str, str]]:
    """(layer, variant) of the choice, and of what scores the same in its place."""
    found = []
    for layer in problem.layers:
        scores = {variant.name: variant.score for variant in layer.variants}
        found += [(layer.name, name) for name, score in scores.items() if score == scores[solution.choice[layer.name]]]
    return frozenset(found)


def _check(problem: Problem, min_distance: int) -> None:
    if not 1 <= min_distance <= len(problem.layers):
        raise ProblemError(f"a distance of {min_distance} layers: use 1 to {len(problem.layers)}, the number of layers")
