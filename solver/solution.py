"""What a solve gives back: always a status, and a choice only when it is truly feasible."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from puzzle.solver.problem import Problem, exact

Status = Literal["optimal", "feasible", "infeasible", "time_limit", "cutoff"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """status "optimal": proven; "feasible": found, not proven; "infeasible": proven that there is none; "time_limit":
    none found in time; "cutoff": none is better than what the caller has. choice {layer: variant} is empty in the last three.
    gap: (objective - bound) / max(1e-12, |objective|). slack {limit: distance to its nearer side}.
    seconds: wall time. solver: name and version."""

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
    problem: Problem, choice: dict[str, str], *, proven: bool, seconds: float, solver: str, bound: float = float("-inf")
) -> Solution:
    """A Solution whose numbers are recomputed exactly from the problem. The choice must be feasible."""
    assert not problem.violated(choice), "a solution is verified before it is certified"
    totals = problem.totals(choice)
    objective = float(totals.pop("score"))
    slack = {c.label: _room(totals[c.resource], c.min, c.max) for c in problem.constraints}
    for count in problem.counts:
        number = Fraction(sum(cell in count.cells for cell in choice.items()))
        slack[count.label] = _room(number, count.min, count.max)
    bound = objective if proven else min(bound, objective)
    return Solution(
        status="optimal" if proven else "feasible",
        objective=objective,
        bound=bound,
        gap=0.0 if proven else (objective - bound) / max(1e-12, abs(objective)),
        choice=dict(choice),
        totals={name: float(value) for name, value in totals.items()},
        slack=slack,
        seconds=seconds,
        solver=solver,
    )


def _room(amount: Fraction, low: float | None, high: float | None) -> float:
    room = [exact(high) - amount] if high is not None else []
    room += [amount - exact(low)] if low is not None else []
    return float(min(room)) if room else float("inf")
