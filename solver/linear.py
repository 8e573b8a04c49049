"""The problem as a mixed-integer linear program, for any back end.

x_iv in {0, 1}: layer i takes cell v; Σ_v x_iv = 1; Σ c x (+ pairs) <= b for every row; minimise Σ s x (+ pairs).
Neighbours: z_ivw >= 0 with Σ_w z_ivw = x_iv and Σ_v z_ivw = x_(i+1)w, a flow through the layers.
Pairs apart: y <= x_a, y <= x_b, y >= x_a + x_b - 1.
Stages: t_is in {0, 1}, layer i in stage s, stages follow each other; u_ivs >= 0 with Σ_s u_ivs = x_iv, Σ_v u_ivs = t_is;
the load Σ r u of every stage lies within the tolerance of their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from puzzle.solver.arrays import Arrays
from puzzle.solver.problem import Problem

SCALE = 1e3  # of the objective and of rows: back ends' tolerances are absolute


@dataclass(slots=True)
class Linear:
    """Variables in [0, 1], binary or not, with costs; rows (variables, coefficients, low, high). cells {(i, v): variable};
    limits: numbers of the rows that are the problem's limits."""

    binary: list[bool] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    rows: list[tuple[list[int], list[float], float, float]] = field(default_factory=list)
    cells: dict[tuple[int, int], int] = field(default_factory=dict)
    limits: set[int] = field(default_factory=set)

    def variable(self, cost: float = 0.0, binary: bool = False) -> int:
        self.binary.append(binary)
        self.cost.append(SCALE * cost)
        return len(self.cost) - 1

    def row(self, variables: Sequence[int], coefficients: Sequence[float], low: float, high: float) -> None:
        self.rows.append((list(variables), [float(c) for c in coefficients], low, high))

    def forbid(self, picked: Sequence[int]) -> None:
        """Cut this very choice off."""
        found = [self.cells[i, int(v)] for i, v in enumerate(picked)]
        self.row(found, [1.0] * len(found), -math.inf, len(found) - 1)

    def picked(self, values: Sequence[float]) -> np.ndarray:
        """The cells [L] of a solution."""
        best: dict[int, tuple[float, int]] = {}
        for (i, v), variable in self.cells.items():
            if i not in best or values[variable] > best[i][0]:
                best[i] = values[variable], v
        return np.array([best[i][1] for i in range(len(best))])


def linearise(problem: Problem, arrays: Arrays, cells: np.ndarray) -> Linear:
    """The program over `cells` [L, V]. Its objective is SCALE times the arrays' score."""
    model = Linear()
    num_layers = len(cells)
    options = [np.flatnonzero(cells[i]).tolist() for i in range(num_layers)]
    for i in range(num_layers):
        for v in options[i]:
            model.cells[i, v] = model.variable(arrays.score[i, v], binary=True)
        model.row([model.cells[i, v] for v in options[i]], [1.0] * len(options[i]), 1.0, 1.0)
    terms: list[list[tuple[int, float]]] = [
        [(x, c) for (i, v), x in model.cells.items() if (c := arrays.rows[k, i, v])] for k in range(arrays.num_rows)
    ]
    _neighbours(model, arrays, options, terms)
    _far_pairs(model, arrays, terms)
    for k, found in enumerate(terms):
        if found or arrays.b[k] < 0:
            model.limits.add(len(model.rows))
            model.row([x for x, _ in found], [SCALE * c for _, c in found], -math.inf, SCALE * float(arrays.b[k]))
    if problem.stages is not None:
        _stages(model, problem, arrays, options)
    return model


def _neighbours(model: Linear, arrays: Arrays, options: list[list[int]], terms: list[list[tuple[int, float]]]) -> None:
    if arrays.arc_score is None:
        return
    assert arrays.arc_rows is not None
    for i in range(len(options) - 1):
        if not (arrays.arc_score[i].any() or arrays.arc_rows[:, i].any()):
            continue
        flow = {(v, w): model.variable(arrays.arc_score[i, v, w]) for v in options[i] for w in options[i + 1]}
        for (v, w), z in flow.items():
            for k in range(arrays.num_rows):
                if arrays.arc_rows[k, i, v, w]:
                    terms[k].append((z, arrays.arc_rows[k, i, v, w]))
        for v in options[i]:
            out = [flow[v, w] for w in options[i + 1]]
            model.row([*out, model.cells[i, v]], [1.0] * len(out) + [-1.0], 0.0, 0.0)
        for w in options[i + 1]:
            into = [flow[v, w] for v in options[i]]
            model.row([*into, model.cells[i + 1, w]], [1.0] * len(into) + [-1.0], 0.0, 0.0)


def _far_pairs(model: Linear, arrays: Arrays, terms: list[list[tuple[int, float]]]) -> None:
    far = arrays.far
    for p in range(len(far.score)):
        a, b = model.cells.get((int(far.i[p]), int(far.v[p]))), model.cells.get((int(far.j[p]), int(far.w[p])))
        if a is None or b is None:
            continue
        y = model.variable(far.score[p])
        for x in (a, b):
            model.row([y, x], [1.0, -1.0], -math.inf, 0.0)
        model.row([y, a, b], [1.0, -1.0, -1.0], -1.0, math.inf)
        for k in range(arrays.num_rows):
            if far.rows[k, p]:
                terms[k].append((y, far.rows[k, p]))


def _stages(model: Linear, problem: Problem, arrays: Arrays, options: list[list[int]]) -> None:
    stages = problem.stages
    assert stages is not None
    group_of = {name: g for g, names in enumerate(arrays.layers) for name in names}
    loads = {
        (layer.name, v.name): float(v.resources[stages.resource]) for layer in problem.layers for v in layer.variants
    }
    # A power of two: dividing rounds nothing, and stages that are just balanced stay so.
    unit = 2.0 ** math.frexp(max((abs(x) for x in loads.values()), default=0.0))[1]
    every: list[tuple[int, float]] = []
    per_stage: list[list[tuple[int, float]]] = [[] for _ in range(stages.count)]
    before: list[int] = []
    for position, layer in enumerate(problem.layers):
        group = group_of[layer.name]
        inside = [model.variable(binary=True) for _ in range(stages.count)]
        model.row(inside, [1.0] * len(inside), 1.0, 1.0)
        for s, t in enumerate(inside):
            if position == 0:
                model.row([t], [1.0], float(s == 0), float(s == 0))
            else:
                came = [before[s], *([before[s - 1]] if s else [])]
                model.row([t, *came], [1.0] + [-1.0] * len(came), -math.inf, 0.0)
        if position == len(problem.layers) - 1:
            model.row([inside[-1]], [1.0], 1.0, 1.0)
        by_stage: list[list[int]] = [[] for _ in range(stages.count)]
        for v in options[group]:
            x, load = model.cells[group, v], loads[layer.name, arrays.variants[group][v]] / unit
            parts = [model.variable() for _ in range(stages.count)]
            model.row([*parts, x], [1.0] * len(parts) + [-1.0], 0.0, 0.0)
            every.append((x, load))
            for s, u in enumerate(parts):
                by_stage[s].append(u)
                per_stage[s].append((u, load))
        for s, t in enumerate(inside):
            model.row([*by_stage[s], t], [1.0] * len(by_stage[s]) + [-1.0], 0.0, 0.0)
        before = inside
    for found in per_stage:
        for sign in (1.0, -1.0):
            share = (1 + sign * stages.tolerance) / stages.count
            # sign · (load of the stage - share · all loads) <= 0
            variables = [u for u, _ in found] + [x for x, _ in every]
            coefficients = [sign * load for _, load in found] + [-sign * share * load for _, load in every]
            model.row(variables, coefficients, -math.inf, 0.0)
