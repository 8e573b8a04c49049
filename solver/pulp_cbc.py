"""PuLP back end: CBC (which pulp 3 ships)."""

from __future__ import annotations

import math
import os
import tempfile
from typing import Any

from puzzle.solver.linear import Linear
from puzzle.solver.problem import ProblemError

HAIR = 1e-7  # relative


def version() -> str:
    import pulp

    return f"pulp {pulp.__version__} CBC"


def run(linear: Linear, seconds: float | None) -> tuple[str, list[float] | None, float]:
    """(status, value of every variable or None, bound on the objective). status: see `solution.Status`.

    When some choices miss a limit by less than CBC's tolerances, it may take the whole problem for infeasible. It is then
    asked again with limits a hair wider; what comes back and breaks a limit by that hair is cut off by the caller. Its preprocessing is off:
    with it CBC 2.10 has called a choice optimal that was not the best one.
    """
    found = _ask(linear, seconds, 0.0)
    return _ask(linear, seconds, HAIR) if found[0] == "infeasible" and linear.limits else found


def _ask(linear: Linear, seconds: float | None, hair: float) -> tuple[str, list[float] | None, float]:
    import pulp

    model = pulp.LpProblem("puzzle", pulp.LpMinimize)
    x = [
        pulp.LpVariable(f"x{n}", cat=pulp.LpBinary) if binary else pulp.LpVariable(f"x{n}", 0, 1)
        for n, binary in enumerate(linear.binary)
    ]
    model += pulp.lpSum(c * v for c, v in zip(linear.cost, x, strict=True) if c)
    for number, (variables, coefficients, low, high) in enumerate(linear.rows):
        total = pulp.lpSum(c * x[v] for v, c in zip(variables, coefficients, strict=True))
        if low == high:
            model += total == low
            continue
        if low > -math.inf:
            model += total >= low
        if high < math.inf:
            model += total <= high + (hair * max(1.0, abs(high)) if number in linear.limits else 0.0)
    options = ["allowableGap 0", "ratioGap 0", "increment 0"]
    for more in (
        ["preprocess off"],
        [],
    ):  # CBC 2.10 crashes without it where only the choice of whole variants is impossible
        if _solved(model, seconds, [*more, *options]):
            break
    else:
        raise ProblemError("CBC crashes on this problem: use the back end 'ortools'")
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        infeasible = model.status == pulp.LpStatusInfeasible
        return ("infeasible" if infeasible else "time_limit"), None, math.inf if infeasible else -math.inf
    values = [variable.value() or 0.0 for variable in x]
    if model.sol_status == pulp.LpSolutionOptimal:
        return "optimal", values, float(pulp.value(model.objective) or 0.0)
    return "feasible", values, -math.inf


def _solved(model: Any, seconds: float | None, options: list[str]) -> bool:
    """Whether CBC came to its end; what it writes on the way goes with it."""
    import pulp

    command = pulp.PULP_CBC_CMD(msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=0.0, threads=1, options=options)
    with tempfile.TemporaryDirectory(dir=_directory()) as command.tmpDir:
        try:
            model.solve(command)
        except pulp.PulpSolverError:
            return False
    return True


def _directory() -> str:
    """For PuLP's files: it splits CBC's command line at spaces, also where the path of the system's temporary directory has some."""
    usual = tempfile.gettempdir()
    places = [place for place in (usual, "/tmp", "/var/tmp") if len(place.split()) == 1 and os.access(place, os.W_OK)]
    return places[0] if places else usual
