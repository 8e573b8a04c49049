"""PuLP back end: CBC (which pulp 3 ships)."""

from __future__ import annotations

import math

from puzzle.solver.scaled import Scaled


def version() -> str:
    import pulp

    return f"pulp {pulp.__version__} CBC"


def run(
    scaled: Scaled, cuts: list[tuple[int, ...]], seconds: float | None
) -> tuple[str, tuple[int, ...] | None, float]:
    """See `solve.Backend`."""
    import pulp

    model = pulp.LpProblem("puzzle", pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary) for j in range(len(s))] for i, s in enumerate(scaled.scores)]
    model += pulp.lpSum(
        float(s) * v for ss, vs in zip(scaled.scores, x, strict=True) for s, v in zip(ss, vs, strict=True) if s
    )
    for cells in x:
        model += pulp.lpSum(cells) == 1
    for row in scaled.rows:
        total = pulp.lpSum(
            float(c) * v for cs, vs in zip(row.coefficients, x, strict=True) for c, v in zip(cs, vs, strict=True) if c
        )
        if row.low is not None:
            model += total >= row.low
        if row.high is not None:
            model += total <= row.high
    for cut in cuts:
        model += pulp.lpSum(x[i][j] for i, j in enumerate(cut)) <= len(cut) - 1
    solver = pulp.PULP_CBC_CMD(
        msg=False,
        timeLimit=seconds,
        gapRel=0.0,
        gapAbs=0.0,
        threads=1,
        options=["allowableGap 0", "ratioGap 0", "increment 0"],
    )
    model.solve(solver)
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        infeasible = model.status == pulp.LpStatusInfeasible
        return ("infeasible" if infeasible else "time_limit"), None, math.inf if infeasible else -math.inf
    values = [[variable.value() or 0.0 for variable in of_layer] for of_layer in x]
    choice = tuple(of_layer.index(max(of_layer)) for of_layer in values)
    if model.sol_status == pulp.LpSolutionOptimal:
        return "optimal", choice, float(pulp.value(model.objective) or 0.0)
    return "feasible", choice, 0.0
