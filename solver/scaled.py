"""The problem as arrays of friendly magnitude: solvers' tolerances are absolute (CBC stops within 1e-5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puzzle.solver.problem import Problem

TARGET = 1e3  # the spread of the objective after scaling


@dataclass(frozen=True, slots=True)
class Row:
    """low <= Σ_i coefficients[i][x(i)] <= high, either side None when open."""

    coefficients: list[np.ndarray]
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Scaled:
    """scores[i][j] shifted so that each layer's least is 0 and multiplied by `factor`; rows scaled to about 1."""

    scores: list[np.ndarray]
    rows: list[Row]
    factor: float
    shift: float

    def unscale(self, objective: float) -> float:
        return objective / self.factor + self.shift


def scale(problem: Problem) -> Scaled:
    scores = [np.array([v.score for v in layer.variants], dtype=float) for layer in problem.layers]
    shift = float(sum(s.min() for s in scores))
    spread = max(float((s - s.min()).max()) for s in scores)
    factor = TARGET / spread if spread > 0 else 1.0
    rows = []
    for constraint in problem.constraints:
        cells = [
            np.array([v.resources[constraint.resource] for v in la.variants], dtype=float) for la in problem.layers
        ]
        # Only the differences within a layer matter: moving each layer's least to the right-hand side keeps digits.
        least = sum(float(c.min()) for c in cells) + problem.fixed.get(constraint.resource, 0.0)
        cells = [c - c.min() for c in cells]
        sides = [abs(side - least) for side in (constraint.min, constraint.max) if side is not None]
        unit = (max(float(c.max()) for c in cells) or max(sides, default=0.0) or 1.0) / 1e3
        rows.append(
            Row(
                [c / unit for c in cells],
                None if constraint.min is None else (constraint.min - least) / unit,
                None if constraint.max is None else (constraint.max - least) / unit,
            )
        )
    return Scaled([(s - s.min()) * factor for s in scores], rows, factor, shift)
