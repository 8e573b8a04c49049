"""Solve one problem with a chosen back end; verify the answer exactly before anyone sees it.

"ortools" (default): the Lagrangian bound of `relax` removes cells that no optimal choice uses, `labels` lists every choice
below a rising threshold, and HiGHS takes over when too many are left. "pulp": the whole linear program to CBC, which
shares nothing with the former but the data. "brute": every choice, for tests.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import product

import numpy as np

from puzzle.solver import mathopt, pulp_cbc
from puzzle.solver.arrays import Arrays, Contradiction, compile_problem
from puzzle.solver.labels import FEASIBLE, MAX_LABELS, Found, search
from puzzle.solver.linear import SCALE, linearise
from puzzle.solver.problem import Problem, ProblemError
from puzzle.solver.relax import Bound, best_prices, bound_at, ceiling
from puzzle.solver.solution import Solution, certified, no_solution

MAX_CUTS = 200
BRUTE_LIMIT = 2_000_000
BACKENDS = ("ortools", "pulp", "brute")
FEW_ROWS = 3  # with more limits labels rarely dominate each other, and linear programs do better than long lists
BEAM = 3000  # labels of a search that need not be complete
EPSILON = 1e-10  # what rounding may hide in a sum of scaled scores


class _Clock:
    def __init__(self, limit: float | None):
        self.begin = time.monotonic()
        self.deadline = None if limit is None else self.begin + limit

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def left(self) -> float | None:
        return None if self.deadline is None else max(0.01, self.deadline - time.monotonic())

    @property
    def over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def solve(
    problem: Problem, backend: str = "ortools", time_limit: float | None = None, cutoff: float | None = None
) -> Solution:
    """The optimal choice, or why there is none.

    cutoff: a score that is already had; when no choice scores less the answer is status "cutoff" without a choice.
    Raises ProblemError for an unknown back end or time limit.
    """
    if backend not in BACKENDS:
        raise ProblemError(f"unknown back end '{backend}': use {', '.join(BACKENDS)}")
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise ProblemError(f"time limit {time_limit!r}: must be above 0 seconds")
    if backend == "brute":
        return brute_force(problem)
    clock = _Clock(time_limit)
    arrays = _possible(problem)
    name = mathopt.version() if backend == "ortools" else pulp_cbc.version()
    if arrays is None:
        return no_solution("infeasible", math.inf, clock.seconds, name)
    if backend == "pulp":
        status, hit, bound = _run(problem, arrays, arrays.allowed, pulp_cbc, clock)
        if status == "infeasible":
            return no_solution(status, math.inf, clock.seconds, name)
        if hit is not None and status == "optimal":
            return certified(problem, hit[1], proven=True, seconds=clock.seconds, solver=name)
        return _unproven(problem, arrays, clock, name, hit, bound, math.inf)
    return _by_labels(problem, arrays, clock, name, cutoff)


def lower_bound(problem: Problem) -> float:
    """No choice scores less; infinite when some limit is out of reach. Quick: no search."""
    arrays = _possible(problem)
    if arrays is None:
        return math.inf
    value = max(bound_at(arrays, p)[0].value for p in best_prices(arrays))
    return math.inf if value > ceiling(arrays) else arrays.true_score(value)


def _possible(problem: Problem) -> Arrays | None:
    """None when pins contradict each other, or a limit is out of reach even if every layer takes what uses least of it."""
    try:
        arrays = compile_problem(problem)
    except Contradiction:
        return None
    least = np.where(arrays.allowed, arrays.rows, np.inf).min(axis=2).sum(axis=1)
    if arrays.arc_rows is not None:
        least = least + np.minimum(arrays.arc_rows, 0.0).min(axis=(2, 3)).sum(axis=1)
    least = least + np.minimum(arrays.far.rows, 0.0).sum(axis=1)
    return None if (least > arrays.b + FEASIBLE * (1 + np.abs(arrays.b))).any() else arrays


def _by_labels(problem: Problem, arrays: Arrays, clock: _Clock, name: str, cutoff: float | None) -> Solution:
    prices = best_prices(arrays)
    bounds, through = _bounds(arrays, prices, arrays.allowed)
    lower, top = max(b.value for b in bounds), ceiling(arrays)
    limit = math.inf if cutoff is None else (cutoff - arrays.shift) * arrays.factor
    if lower > top:
        return no_solution("infeasible", math.inf, clock.seconds, name)
    if lower >= limit:
        return no_solution("cutoff", arrays.true_score(lower), clock.seconds, name)
    best: tuple[float, dict[str, str]] | None = None
    # Begin where about one layer in eight has a second cell, and widen: nothing is lost, every round is complete.
    reduced = np.sort(through[arrays.allowed] - lower)
    step = float(reduced[min(len(reduced) - 1, len(through) + len(through) // 8)])
    step = max(step, 1e-9 * max(1.0, abs(lower)))
    base, threshold = lower, min(lower + step, limit)
    beamed = False
    while not clock.over:
        edge = threshold + EPSILON * max(1.0, abs(threshold))
        cells = arrays.allowed & (through < edge)
        found = _search(problem, arrays, prices, cells, edge, clock)
        if not found.complete:  # too many choices are that close: a beam finds a good one, below which there are fewer
            if beamed:
                break
            beamed = True
            found = _search(problem, arrays, prices, cells, edge, clock, beam=BEAM)
            hit = _first_valid(problem, arrays, found)
            if hit is None or hit[0] >= threshold:
                break
            best, threshold = hit, hit[0]
            continue
        hit = _first_valid(problem, arrays, found)
        if hit is not None and (best is None or hit[0] < best[0]):
            best = hit
        if best is not None and best[0] <= threshold:
            return certified(problem, best[1], proven=True, seconds=clock.seconds, solver=name)
        lower = max(lower, threshold)
        if threshold >= limit:
            return no_solution("cutoff", arrays.true_score(threshold), clock.seconds, name)
        if best is None and threshold > top:
            return no_solution("infeasible", math.inf, clock.seconds, name)
        step *= 2.0
        threshold = min(base + step, limit, best[0] if best is not None else math.inf)
    return _by_programs(problem, arrays, through, clock, base, step, threshold, lower, best, limit)


def _by_programs(
    problem: Problem,
    arrays: Arrays,
    through: np.ndarray,
    clock: _Clock,
    base: float,
    step: float,
    edge: float,
    lower: float,
    best: tuple[float, dict[str, str]] | None,
    limit: float,
) -> Solution:
    """Too many choices to list: linear programs over the cells that may hold a choice below a rising edge."""
    top, name = ceiling(arrays), mathopt.version()
    num_hits = 0
    while not clock.over:
        step *= 2.0
        edge = max(edge, base + step) if num_hits < 2 else math.inf  # two programs agree: what is left is the proof
        edge = min(limit, edge if edge <= top else math.inf, best[0] if best else math.inf)
        margin = EPSILON * max(1.0, abs(edge)) if edge < math.inf else 0.0
        status, hit, bound = _run(problem, arrays, arrays.allowed & (through < edge + margin), mathopt, clock)
        num_hits += hit is not None
        if hit is not None and (best is None or hit[0] < best[0]):
            best = hit
        lower = max(lower, min(edge, bound))
        if status not in ("optimal", "infeasible"):
            break
        if best is not None and best[0] <= edge and best[0] < limit:
            return certified(problem, best[1], proven=True, seconds=clock.seconds, solver=name)
        if edge >= limit:
            found = "infeasible" if limit == math.inf else "cutoff"
            return no_solution(found, arrays.true_score(limit), clock.seconds, name)
    return _unproven(problem, arrays, clock, name, best, lower, limit)


def _bounds(arrays: Arrays, prices: list[np.ndarray], cells: np.ndarray) -> tuple[list[Bound], np.ndarray]:
    """The bounds at all prices, and the best bound on choices through each cell."""
    found = [bound_at(arrays, p, cells) for p in prices]
    return [b for b, _ in found], np.maximum.reduce([through for _, through in found])


def _search(
    problem: Problem,
    arrays: Arrays,
    prices: list[np.ndarray],
    cells: np.ndarray,
    edge: float,
    clock: _Clock,
    beam: int | None = None,
) -> Found:
    none = Found(np.zeros((0, len(cells)), dtype=int), np.zeros(0), True)
    if not cells.any(axis=1).all():
        return none
    bounds, through = _bounds(arrays, prices, cells)
    cells = cells & (through < edge)
    if not cells.any(axis=1).all():
        return none
    if beam is not None:
        return search(arrays, bounds, edge, cells, keep=beam, beam=True, deadline=clock.deadline)
    keep = MAX_LABELS if arrays.num_rows <= FEW_ROWS else MAX_LABELS // 10
    found = search(arrays, bounds, edge, cells, keep=keep, deadline=clock.deadline)
    if found.thinned and len(found.score) and problem.violated(arrays.choice(found.picked[0])):
        # The best holds by floating point alone, and may have pushed out a choice that truly holds.
        return search(arrays, bounds, edge, cells, thin=False, deadline=clock.deadline)
    return found


def _first_valid(problem: Problem, arrays: Arrays, found: Found) -> tuple[float, dict[str, str]] | None:
    """The best found choice that holds in exact arithmetic."""
    for score, picked in zip(found.score.tolist(), found.picked, strict=True):
        choice = arrays.choice(picked)
        if not problem.violated(choice):
            return score, choice
    return None


def _run(
    problem: Problem, arrays: Arrays, cells: np.ndarray, backend, clock: _Clock
) -> tuple[str, tuple[float, dict[str, str]] | None, float]:
    """(status, score and choice or None, lower bound) of the program over `cells`; a choice that breaks a limit by a hair
    is cut off, and the rest solved again."""
    if not cells.any(axis=1).all():
        return "infeasible", None, math.inf
    linear = linearise(problem, arrays, cells)
    bound = -math.inf
    for _ in range(MAX_CUTS):
        if clock.over:
            break
        status, values, found_bound = backend.run(linear, clock.left)
        if values is None and status == "infeasible":
            return status, None, math.inf
        bound = max(bound, found_bound / SCALE if math.isfinite(found_bound) else -math.inf)
        if values is None:
            break
        picked = linear.picked(values)
        choice = arrays.choice(picked)
        if not problem.violated(choice):
            return status, (_score(arrays, picked), choice), bound
        linear.forbid(picked)
    return "time_limit", None, bound


def _unproven(
    problem: Problem,
    arrays: Arrays,
    clock: _Clock,
    name: str,
    best: tuple[float, dict[str, str]] | None,
    lower: float,
    limit: float,
) -> Solution:
    bound = arrays.true_score(min(lower, limit))
    if best is None:
        return no_solution("time_limit", bound, clock.seconds, name)
    return certified(problem, best[1], proven=False, bound=bound, seconds=clock.seconds, solver=name)


def _score(arrays: Arrays, picked: np.ndarray) -> float:
    at, far = np.arange(len(picked)), arrays.far
    total = arrays.score[at, picked].sum()
    if arrays.arc_score is not None:
        total += arrays.arc_score[at[:-1], picked[:-1], picked[1:]].sum()
    return float(total + far.score[(picked[far.i] == far.v) & (picked[far.j] == far.w)].sum())


def choices(problem: Problem) -> Iterator[dict[str, str]]:
    """Every choice, feasible or not."""
    for names in product(*([v.name for v in layer.variants] for layer in problem.layers)):
        yield {layer.name: name for layer, name in zip(problem.layers, names, strict=True)}


def brute_force(problem: Problem) -> Solution:
    """Every choice, in exact arithmetic: the twin that the tests hold the back ends against."""
    count = math.prod(len(layer.variants) for layer in problem.layers)
    if count > BRUTE_LIMIT:
        raise ProblemError(f"brute force would try {count} choices: use it up to {BRUTE_LIMIT}, or another back end")
    clock = _Clock(None)
    valid = ((problem.totals(c)["score"], c) for c in choices(problem) if not problem.violated(c))
    best = min(valid, key=lambda item: item[0], default=None)
    if best is None:
        return no_solution("infeasible", math.inf, clock.seconds, "brute force")
    return certified(problem, best[1], proven=True, seconds=clock.seconds, solver="brute force")
