"""What a solve gives back: always a status, and a choice only when it is truly feasible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from puzzle.solver.problem import Problem

Status = Literal["optimal", "feasible", "infeasible", "time_limit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """status "optimal": proven; "feasible": found, not proven; "infeasible": proven that there is none; "time_limit":
    none found in time. choice {layer: variant} is empty in the last two. gap: (objective - bound) / max(1e-12, |objective|).
    slack {constraint: distance to its nearer limit}. seconds: wall time. solver: name and version."""

    status: Status
    objective: float
    bound: float
    gap: float
    choice: dict[str, str]
    totals: dict[str, float]
    slack: dict[str, float]
    seconds: float
    solver: str


def no_solution(status: Status, bound: float, seconds: float, solver: str) -> Solution:
    return Solution(
        status=status,
        objective=float("inf"),
        bound=bound,
        gap=float("inf"),
        choice={},
        totals={},
        slack={},
        seconds=seconds,
        solver=solver,
    )


def certified(
    problem: Problem, choice: dict[str, str], *, bound: float, proven: bool, seconds: float, solver: str
) -> Solution:
    """A Solution whose numbers are recomputed exactly from the problem. The choice must be feasible."""
    assert not problem.violated(choice), "a solution is verified before it is certified"
    totals = problem.totals(choice)
    objective = float(totals.pop("score"))
    slack = {}
    for c in problem.constraints:
        sides = [
            s
            for s in (
                None if c.max is None else c.max - float(totals[c.resource]),
                None if c.min is None else float(totals[c.resource]) - c.min,
            )
            if s is not None
        ]
        slack[c.label] = min(sides) if sides else float("inf")
    bound = min(bound, objective)
    return Solution(
        status="optimal" if proven else "feasible",
        objective=objective,
        bound=objective if proven else bound,
        gap=0.0 if proven else (objective - bound) / max(1e-12, abs(objective)),
        choice=dict(choice),
        totals={name: float(value) for name, value in totals.items()},
        slack=slack,
        seconds=seconds,
        solver=solver,
    )
