"""The Lagrangian bound: limits become prices, and the cheapest path through the layers at given prices is a bound.

    L(λ) = min_x [ s(x) + λ·(C x - b) ],  λ >= 0,    s(x*) >= max_λ L(λ)           (Geoffrion 1974)

x runs over all choices, `C x <= b` are the rows of `Arrays`, x* is the optimum. For fixed prices the minimum is a
shortest path through the layers (only neighbours add anything), and the cheapest path through each single cell is a
bound for every choice that uses it: a cell whose bound reaches the score of a known choice is in no better one. Pairs
of layers apart add min(0, w) / 2 at either end, which is never more than what they add when both ends are chosen (w) or
one (0).

The best prices come from Kelley's cutting planes (Kelley 1960), whose small linear program GLOP solves:

    max θ   s.t.   θ <= L(λ_t) + (λ - λ_t)·(C x_t - b)   for every λ_t tried,   0 <= λ <= limit

where x_t is the cheapest path at λ_t, which makes C x_t - b a supergradient of the concave L there (pairs of layers
apart: of the bound with their halves). The next λ_t is its solution; the end is where θ is no more than the best
L(λ_t). All values are in the scaled units of `Arrays`.

Two layers of 2 seconds within 2.5, either of which may be halved, for a score of 1 or of 2. Both must be, which scores
3; the bound is that of the linear program, which halves the second by half:

    >>> from puzzle.solver import Constraint, Layer, Problem, Variant
    >>> from puzzle.solver.arrays import compile_problem
    >>> full = Variant(name="full", score=0.0, resources={"seconds": 2.0})
    >>> layers = tuple(
    ...     Layer(name=name, variants=(full, Variant(name="half", score=score, resources={"seconds": 1.0})))
    ...     for name, score in (("L0", 1.0), ("L1", 2.0))
    ... )
    >>> arrays = compile_problem(Problem(layers=layers, constraints=(Constraint(resource="seconds", max=2.5),)))
    >>> round(arrays.true_score(bound_at(arrays, best_prices(arrays)[0])[0].value), 6)
    2.0
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from puzzle.solver.arrays import Arrays

MAX_STEPS = 400
TOLERANCE = 1e-9  # of the bound: where the cutting planes stop
PRICE_LIMIT = 1e7
NUDGES = (0.6, 0.8, 0.92, 0.98, 1.02, 1.08, 1.25, 1.6)  # more, or in pairs of rows, is no faster


@dataclass(frozen=True, slots=True)
class Bound:
    """One vector of prices and what it proves. value: no choice is below. unit [L, V]: what a cell costs at these prices.
    to_go [L, V]: the least that the layers after a cell cost. half [P]: what far pairs add at either end. constant: -λ·b,
    a part of every path's cost."""

    prices: np.ndarray
    value: float
    unit: np.ndarray
    to_go: np.ndarray
    half: np.ndarray
    constant: float


def _priced(arrays: Arrays, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Costs of cells [L, V] (infinite where there is none), of arcs [L-1, V, V], and the halves of far pairs [P]."""
    unit = np.where(arrays.allowed, arrays.score + np.tensordot(prices, arrays.rows, 1), np.inf)
    arcs = None
    if arrays.arc_score is not None:
        assert arrays.arc_rows is not None
        arcs = arrays.arc_score + np.tensordot(prices, arrays.arc_rows, 1)
    far = arrays.far
    half = np.minimum(0.0, far.score + prices @ far.rows) / 2
    if half.size:
        np.add.at(unit, (far.i, far.v), half)
        np.add.at(unit, (far.j, far.w), half)
    return unit, arcs, half


def _shortest(unit: np.ndarray, arcs: np.ndarray | None) -> np.ndarray:
    """The cells [L] of the cheapest path."""
    if arcs is None:
        return unit.argmin(axis=1)
    num_layers = len(unit)
    best, came = unit[0], np.empty(unit.shape, dtype=int)
    for i in range(1, num_layers):
        through = best[:, None] + arcs[i - 1]
        came[i] = through.argmin(axis=0)
        best = through[came[i], np.arange(through.shape[1])] + unit[i]
    path = np.empty(num_layers, dtype=int)
    path[-1] = best.argmin()
    for i in range(num_layers - 1, 0, -1):
        path[i - 1] = came[i, path[i]]
    return path


def _evaluate(arrays: Arrays, prices: np.ndarray) -> tuple[float, np.ndarray]:
    """L(λ) and a supergradient [K]."""
    unit, arcs, half = _priced(arrays, prices)
    path = _shortest(unit, arcs)
    at = np.arange(len(path))
    value = unit[at, path].sum() - prices @ arrays.b
    slope = arrays.rows[:, at, path].sum(axis=1) - arrays.b
    if arcs is not None:
        assert arrays.arc_rows is not None
        value += arcs[at[:-1], path[:-1], path[1:]].sum()
        slope = slope + arrays.arc_rows[:, at[:-1], path[:-1], path[1:]].sum(axis=1)
    far = arrays.far
    if half.size:
        ends = (path[far.i] == far.v).astype(float) + (path[far.j] == far.w)
        slope = slope + far.rows @ (np.where(half < 0, 0.5, 0.0) * ends)
    return float(value), slope


def best_prices(arrays: Arrays) -> list[np.ndarray]:
    """Prices whose bounds are highest, best first (a handful: each cuts off choices that others do not)."""
    num_rows = arrays.num_rows
    if num_rows == 0:
        return [np.zeros(0)]
    from ortools.linear_solver import pywraplp

    master = pywraplp.Solver.CreateSolver("GLOP")
    limit = 10.0
    variables = [master.NumVar(0.0, limit, f"p{k}") for k in range(num_rows)]
    level = master.NumVar(-math.inf, math.inf, "level")
    master.Maximize(level)
    found: list[tuple[float, np.ndarray]] = []
    prices = np.zeros(num_rows)
    best, center = -math.inf, prices
    top = ceiling(arrays)
    for step in range(MAX_STEPS):
        value, slope = _evaluate(arrays, prices)
        found.append((value, prices))
        if value > best:
            best, center = value, prices
        if best > top:
            break  # no choice costs that much: there is none
        cut = master.Constraint(-master.infinity(), float(value - slope @ prices))
        cut.SetCoefficient(level, 1.0)
        for k, variable in enumerate(variables):
            cut.SetCoefficient(variable, -float(slope[k]))
        if master.Solve() != pywraplp.Solver.OPTIMAL:
            break
        proposal = np.array([v.solution_value() for v in variables])
        if level.solution_value() - best <= TOLERANCE * max(1.0, abs(best)):
            if proposal.max() < limit * (1 - 1e-9) or limit >= PRICE_LIMIT:
                break
            limit *= 10.0
            for variable in variables:
                variable.SetUb(limit)
        # With many rows the far corner that a cut proposes is a poor guess: move most of the way from the best prices.
        prices = proposal if num_rows <= 3 or step % 4 == 0 else 0.5 * (proposal + center)
    found.sort(key=lambda item: -item[0])
    best_of = [p for _, p in found[:4]]
    return best_of + _around(best_of[0])


def _around(prices: np.ndarray) -> list[np.ndarray]:
    """Prices a little off the best: they see through partial choices that use too much of one limit, little of another."""
    found = []
    for k in np.flatnonzero(prices):
        for factor in NUDGES:
            nudged = prices.copy()
            nudged[k] *= factor
            found.append(nudged)
    return found


def ceiling(arrays: Arrays) -> float:
    """More than any choice costs."""
    top = np.where(arrays.allowed, arrays.score, 0.0).max(axis=1).sum()
    if arrays.arc_score is not None:
        top += np.maximum(arrays.arc_score, 0.0).max(axis=(1, 2)).sum()
    top += np.maximum(arrays.far.score, 0.0).sum()
    return float(top) * (1 + 1e-6) + 1e-6


def bound_at(arrays: Arrays, prices: np.ndarray, cells: np.ndarray | None = None) -> tuple[Bound, np.ndarray]:
    """The bound at these prices, and per cell [L, V] the least cost of any path through it. cells: all that may be used."""
    unit, arcs, half = _priced(arrays, prices)
    if cells is not None:
        unit = np.where(cells, unit, np.inf)
    num_layers = len(unit)
    constant = -float(prices @ arrays.b)
    to_go = np.zeros_like(unit)
    if arcs is None:
        least = unit.min(axis=1)
        after = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0.0]])
        to_go += after[:, None]
        through = unit + (least.sum() - least)[:, None] + constant
        value = float(least.sum()) + constant
    else:
        for i in range(num_layers - 2, -1, -1):
            to_go[i] = (arcs[i] + (unit[i + 1] + to_go[i + 1])[None, :]).min(axis=1)
        so_far = unit[0]
        through = np.empty_like(unit)
        through[0] = so_far + to_go[0] + constant
        for i in range(1, num_layers):
            so_far = (so_far[:, None] + arcs[i - 1]).min(axis=0) + unit[i]
            through[i] = so_far + to_go[i] + constant
        value = float(through[0].min())
    return Bound(prices, value, unit, to_go, half, constant), through
