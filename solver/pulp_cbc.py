"""PuLP back end: CBC (which pulp 3 ships)."""

from __future__ import annotations

import math

from puzzle.solver.linear import Linear


def version() -> str:
    import pulp

    return f"pulp {pulp.__version__} CBC"


def run(linear: Linear, seconds: float | None) -> tuple[str, list[float] | None, float]:
    """(status, value of every variable or None, bound on the objective). status: see `solution.Status`."""
    import pulp

    model = pulp.LpProblem("puzzle", pulp.LpMinimize)
    x = [
        pulp.LpVariable(f"x{n}", cat=pulp.LpBinary) if binary else pulp.LpVariable(f"x{n}", 0, 1)
        for n, binary in enumerate(linear.binary)
    ]
    model += pulp.lpSum(c * v for c, v in zip(linear.cost, x, strict=True) if c)
    for variables, coefficients, low, high in linear.rows:
        total = pulp.lpSum(c * x[v] for v, c in zip(variables, coefficients, strict=True))
        if low == high:
            model += total == low
            continue
        if low > -math.inf:
            model += total >= low
        if high < math.inf:
            model += total <= high
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
    values = [variable.value() or 0.0 for variable in x]
    if model.sol_status == pulp.LpSolutionOptimal:
        return "optimal", values, float(pulp.value(model.objective) or 0.0)
    return "feasible", values, -math.inf
