"""Numbers in, choices out: pick one variant per layer under resource limits.

from puzzle.solver import Constraint, Layer, Problem, Variant, solve
"""

from puzzle.solver.diverse import diverse
from puzzle.solver.explain import explain_infeasible
from puzzle.solver.jsonio import read_problem
from puzzle.solver.pareto import frontier
from puzzle.solver.problem import Constraint, Count, Layer, Pair, Problem, ProblemError, Stages, Variant
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve
from puzzle.solver.sweep import sweep

__all__ = [
    "Constraint",
    "Count",
    "Layer",
    "Pair",
    "Problem",
    "ProblemError",
    "Solution",
    "Stages",
    "Variant",
    "diverse",
    "explain_infeasible",
    "frontier",
    "read_problem",
    "solve",
    "sweep",
]
