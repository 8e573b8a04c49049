"""Solve one problem with a chosen back end; verify the answer exactly before anyone sees it.

MIP: x_ij in {0, 1}; Σ_j x_ij = 1 for every layer i; Σ_ij r_ijk x_ij <= hi_k - f_k (and >= lo_k - f_k); minimise
Σ_ij s_ij x_ij. A back end works in floating point with tolerances, so its answer may exceed a limit by a hair: then that
very choice is cut off (Σ over its cells of x <= L - 1) and the problem solved again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

from puzzle.solver.problem import Problem, ProblemError
from puzzle.solver.scaled import Scaled, scale
from puzzle.solver.solution import Solution, certified, no_solution

MAX_CUTS = 200
BRUTE_LIMIT = 2_000_000

# A back end takes the scaled problem, the cells already cut off, and seconds left (None: no limit); it gives
# (status, cells chosen per layer or None, bound on the scaled objective).
Backend = Callable[[Scaled, list[tuple[int, ...]], float | None], tuple[str, tuple[int, ...] | None, float]]


def backends() -> dict[str, tuple[Backend, Callable[[], str]]]:
    """Name -> (function, its name and version). Imports happen on use."""
    from puzzle.solver import mathopt, pulp_cbc

    return {"ortools": (mathopt.run, mathopt.version), "pulp": (pulp_cbc.run, pulp_cbc.version)}


def solve(problem: Problem, backend: str = "ortools", time_limit: float | None = None) -> Solution:
    """The optimal choice, or why there is none. Raises ProblemError for an unknown back end."""
    if backend == "brute":
        return brute_force(problem)
    known = backends()
    if backend not in known:
        raise ProblemError(f"unknown back end '{backend}': use {', '.join([*known, 'brute'])}")
    run, version = known[backend]
    started = time.monotonic()
    scaled = scale(problem)
    if any(row.low is not None and row.high is not None and row.low > row.high for row in scaled.rows):
        return no_solution("infeasible", float("inf"), 0.0, version())
    cuts: list[tuple[int, ...]] = []
    bound = float("-inf")
    while True:
        elapsed = time.monotonic() - started
        left = None if time_limit is None else max(0.01, time_limit - elapsed)
        status, cells, scaled_bound = run(scaled, cuts, left)
        elapsed = time.monotonic() - started
        bound = max(bound, scaled.unscale(scaled_bound))
        if cells is None:
            return no_solution("infeasible" if status == "infeasible" else "time_limit", bound, elapsed, version())
        choice = {la.name: la.variants[j].name for la, j in zip(problem.layers, cells, strict=True)}
        if not problem.violated(choice):
            return certified(
                problem, choice, bound=bound, proven=status == "optimal", seconds=elapsed, solver=version()
            )
        cuts.append(cells)
        if len(cuts) >= MAX_CUTS or (time_limit is not None and elapsed >= time_limit):
            return no_solution("time_limit", bound, elapsed, version())


def brute_force(problem: Problem) -> Solution:
    """Every choice, in exact arithmetic: the twin that the tests hold the back ends against."""
    count = 1
    for layer in problem.layers:
        count *= len(layer.variants)
    if count > BRUTE_LIMIT:
        raise ProblemError(f"brute force would try {count} choices: use it up to {BRUTE_LIMIT}, or another back end")
    started = time.monotonic()
    best, best_score = None, None
    for names in product(*([v.name for v in layer.variants] for layer in problem.layers)):
        choice = {layer.name: name for layer, name in zip(problem.layers, names, strict=True)}
        if problem.violated(choice):
            continue
        score = problem.totals(choice)["score"]
        if best_score is None or score < best_score:
            best, best_score = choice, score
    seconds = time.monotonic() - started
    if best is None:
        return no_solution("infeasible", float("inf"), seconds, "brute force")
    assert best_score is not None
    return certified(problem, best, bound=float(best_score), proven=True, seconds=seconds, solver="brute force")
