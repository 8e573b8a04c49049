"""`puzzle solve --problem problem.json`: the solver for libraries that are not ours. Needs no torch and no cost table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puzzle.base.files import write_json
from puzzle.solver.diverse import diverse
from puzzle.solver.explain import explain_infeasible
from puzzle.solver.jsonio import read_problem, write_solutions
from puzzle.solver.solve import solve


def solve_file(
    problem_path: Path, out: Path, *, backend: str = "ortools", time_limit: float | None = None
) -> dict[str, Any]:
    """Solve the problem of a file and write solution.json's value to `out`, a conflict included. Raises UserError."""
    problem, wanted = read_problem(problem_path)
    solutions = []
    if wanted is not None:
        solutions = diverse(problem, wanted.count, wanted.min_distance, backend=backend, time_limit=time_limit)
    solutions = solutions or [solve(problem, backend, time_limit)]
    conflict = explain_infeasible(problem) if solutions[0].status == "infeasible" else None
    value = write_solutions(solutions, conflict)
    write_json(out, value)
    return value
