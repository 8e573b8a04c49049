"""OR-Tools back end: HiGHS through MathOpt. (Never through highspy: it and ortools crash in one process.)"""

from __future__ import annotations

import datetime
import math

from puzzle.solver.scaled import Scaled


def version() -> str:
    import ortools

    return f"ortools {ortools.__version__} HiGHS"


def run(
    scaled: Scaled, cuts: list[tuple[int, ...]], seconds: float | None
) -> tuple[str, tuple[int, ...] | None, float]:
    """See `solve.Backend`."""
    from ortools.math_opt.python import mathopt

    model = mathopt.Model(name="puzzle")
    x = [[model.add_binary_variable(name=f"x_{i}_{j}") for j in range(len(s))] for i, s in enumerate(scaled.scores)]
    for cells in x:
        model.add_linear_constraint(mathopt.fast_sum(cells) == 1)
    for row in scaled.rows:
        total = mathopt.fast_sum(
            float(c) * v for cs, vs in zip(row.coefficients, x, strict=True) for c, v in zip(cs, vs, strict=True) if c
        )
        model.add_linear_constraint(
            lb=-math.inf if row.low is None else row.low, ub=math.inf if row.high is None else row.high, expr=total
        )
    for cut in cuts:
        model.add_linear_constraint(mathopt.fast_sum(x[i][j] for i, j in enumerate(cut)) <= len(cut) - 1)
    model.minimize(
        mathopt.fast_sum(
            float(s) * v for ss, vs in zip(scaled.scores, x, strict=True) for s, v in zip(ss, vs, strict=True) if s
        )
    )
    parameters = mathopt.SolveParameters(
        relative_gap_tolerance=0.0,
        absolute_gap_tolerance=0.0,
        random_seed=0,
        time_limit=None if seconds is None else datetime.timedelta(seconds=seconds),
    )
    result = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters)
    reason = result.termination.reason
    bound = result.termination.objective_bounds.dual_bound
    if not result.has_primal_feasible_solution():
        infeasible = {mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED}
        return (
            ("infeasible" if reason in infeasible else "time_limit"),
            None,
            math.inf if reason in infeasible else bound,
        )
    found = result.variable_values()
    values = [[found[variable] for variable in of_layer] for of_layer in x]
    choice = tuple(of_layer.index(max(of_layer)) for of_layer in values)
    return ("optimal" if reason == mathopt.TerminationReason.OPTIMAL else "feasible"), choice, bound
