"""OR-Tools back end: HiGHS through MathOpt. (Never through highspy: it and ortools crash in one process.)"""

from __future__ import annotations

import datetime
import math

from puzzle.solver.linear import Linear


def version() -> str:
    import ortools

    return f"ortools {ortools.__version__} HiGHS"


def run(linear: Linear, seconds: float | None) -> tuple[str, list[float] | None, float]:
    """(status, value of every variable or None, bound on the objective). status: see `solution.Status`."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model(name="puzzle")
    x = [model.add_binary_variable() if binary else model.add_variable(lb=0.0, ub=1.0) for binary in linear.binary]
    for variables, coefficients, low, high in linear.rows:
        total = mathopt.fast_sum(c * x[v] for v, c in zip(variables, coefficients, strict=True))
        model.add_linear_constraint(lb=low, ub=high, expr=total)
    model.minimize(mathopt.fast_sum(c * v for c, v in zip(linear.cost, x, strict=True) if c))
    parameters = mathopt.SolveParameters(
        relative_gap_tolerance=0.0,
        absolute_gap_tolerance=0.0,
        random_seed=0,
        time_limit=None if seconds is None else datetime.timedelta(seconds=seconds),
    )
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    reason = result.termination.reason
    if not result.has_primal_feasible_solution():
        if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
            return "infeasible", None, math.inf
        return "time_limit", None, result.termination.objective_bounds.dual_bound
    found = result.variable_values()
    optimal = reason == mathopt.TerminationReason.OPTIMAL
    return ("optimal" if optimal else "feasible"), [found[v] for v in x], result.termination.objective_bounds.dual_bound
