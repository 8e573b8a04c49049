"""Choose one variant pair per layer: the library's scores and a cost table in, architecture.json out. Needs no torch.

`puzzle/selection.py` poses the problem at every batch size; the answer is the batch size that allows the smallest sum of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from puzzle import __version__
from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.choose.cost_model import Choice, CostModel, Prediction
from puzzle.choose.fusion import PLUS, Fusion
from puzzle.choose.goal import Goal, Target
from puzzle.choose.infeasible import why_infeasible
from puzzle.choose.problem import Selection, layer_label, select
from puzzle.choose.workloads import LIMITS, Also, Served
from puzzle.library.manifest import KINDS, PARENT, Library
from puzzle.profile.cost_table import PACKAGED, CostTable, find_costs
from puzzle.profile.engine import EngineModel, open_engine
from puzzle.solver.baselines import greedy, most, only, random_feasible, uniform
from puzzle.solver.diverse import diverse
from puzzle.solver.explain import prices
from puzzle.solver.problem import Problem, ProblemError
from puzzle.solver.solution import Solution
from puzzle.solver.sweep import sweep

NO_OP_ONLY = [f"{attention}|{ffn}" for attention in (PARENT, "none") for ffn in (PARENT, "none")]
BASELINES: dict[str, Callable[[Problem], Solution]] = {
    "greedy": greedy,
    "uniform": uniform,
    "random": lambda problem: min(random_feasible(problem, 20), key=lambda s: s.objective, default=uniform(problem)),
    "no-op": lambda problem: only(problem, NO_OP_ONLY, "no-op only"),
    "most-parameters": lambda problem: most(problem, "num_parameters"),
}


def choices_of(solution: Solution) -> list[Choice]:
    """The solution's pairs, layer by layer."""
    split = [solution.choice[layer_label(index)].split("|") for index in range(len(solution.choice))]
    return [{"attention": attention, "ffn": ffn.removesuffix(PLUS)} for attention, ffn in split]


def solve_library(
    library: Library,
    table: CostTable | EngineModel,
    work: Workload,
    goal: Goal,
    *,
    backend: str = "ortools",
    time_limit: float | None = None,
    baseline: str | None = None,
    explain: bool = False,
    also: Sequence[Also] = (),
    fusion: Fusion | None = None,
    same_batch: bool = False,
) -> dict[str, Any]:
    """The architecture as architecture.json has it. Raises UserError when the goal cannot be met, with what can be.

    baseline: one of BASELINES, in place of the optimum. explain: add "prices", what looser limits would buy.
    """
    selection = select(library, table, work, goal, also, fusion, same_batch)
    problems = selection.problems()
    best, solutions = choose(problems, backend, time_limit, baseline)
    if best is None:
        if baseline is not None:
            raise UserError(
                f"--baseline {baseline} finds no child that meets the goal: leave it out, or relax the goal"
            )
        if any(s.status == "time_limit" for s in solutions.values()):
            raise UserError(f"no child was found in --time-limit {time_limit:g} s: allow more")
        raise UserError(why_infeasible(problems, selection.served))
    solved = describe(selection, int(best), solutions[best])
    solved["objective_per_batch"] = {b: s.objective for b, s in solutions.items() if s.choice}
    if explain:
        solved["prices"] = [asdict(price) for price in prices(problems[best], solutions[best])]
    return solved


def solve_diverse(
    selection: Selection, count: int, min_distance: int, backend: str = "ortools", time_limit: float | None = None
) -> list[dict[str, Any]]:
    """Up to `count` architectures at the best batch size, each at least `min_distance` layers from all earlier ones.

    time_limit: seconds for each. Raises UserError when there is none, or for a distance that there cannot be.
    """
    problems = selection.problems()
    best, _ = choose(problems, backend, time_limit, None)
    if best is None:
        raise UserError(why_infeasible(problems, selection.served))
    try:
        found = diverse(problems[best], count, min_distance, backend=backend, time_limit=time_limit)
    except ProblemError as error:
        raise UserError(str(error)) from error
    return [describe(selection, int(best), solution) for solution in found]


def choose(
    problems: Mapping[str, Problem], backend: str, time_limit: float | None, baseline: str | None
) -> tuple[str | None, dict[str, Solution]]:
    """(best batch or None, solution per batch), by the solver or by a simple rule."""
    try:
        if baseline is None:
            return sweep(problems, backend=backend, time_limit=time_limit)
        solutions = {label: BASELINES[baseline](problem) for label, problem in problems.items()}
    except ProblemError as error:
        raise UserError(str(error)) from error
    feasible = [label for label, solution in solutions.items() if solution.choice]
    return (min(feasible, key=lambda label: solutions[label].objective) if feasible else None), solutions


def describe(selection: Selection, batch: int, solution: Solution) -> dict[str, Any]:
    """What architecture.json says of one solution at one batch size."""
    library, costs, parent = selection.library, selection.costs, selection.parent
    layers = choices_of(solution)
    child = _predicted(selection, costs, solution, batch)
    whole = [dict.fromkeys(KINDS, PARENT)] * library.num_layers
    same = costs.predict(whole, batch)
    goal = selection.goal
    return {
        "puzzle": __version__,
        "library": {
            "parent_fingerprint": library.facts["parent"]["fingerprint"],
            **({"synthetic_scores": True} if library.facts.get("synthetic_scores") else {}),
        },
        "goal": {
            "throughput": _text(goal.throughput),
            "latency_seconds": _text(goal.latency),
            "ttft_seconds": _text(goal.ttft),
            "tpot_seconds": _text(goal.tpot),
            "memory_bytes": _text(goal.memory),
            "num_parameters": _text(goal.max_parameters),
            "cached_tokens": goal.cached_tokens,
            "keep_attention": goal.keep_attention,
            "pinned": goal.pinned,
            "alike": goal.alike,
            "stages": goal.stages,
        },
        "workload": asdict(costs.work),
        "costs": {"device": costs.table.device, "dtype": costs.table.dtype, "sha256": costs.table.hash},
        "status": solution.status,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "slack": solution.slack,
        "seconds": solution.seconds,
        "solver": solution.solver,
        "layers": layers,
        "predicted": {
            **asdict(child),
            "speedup": child.tokens_per_second / parent.tokens_per_second,
            "speedup_at_same_batch": child.tokens_per_second / same.tokens_per_second,
        },
        "parent_predicted": asdict(parent),
        "extrapolated": sorted({*costs.extrapolated(layers, batch), *costs.extrapolated(whole, parent.batch)}),
        "also": [_also(selection, one, solution, batch) for one in selection.others],
        **_fused(selection, solution, batch),
    }


def _predicted(selection: Selection, costs: CostModel, solution: Solution, batch: int) -> Prediction:
    """Of the child as it will run: fused, where it was solved so."""
    layers, fusion = choices_of(solution), selection.fusion
    change = None if fusion is None else fusion.change(fusion.runs(solution), layers, costs, batch)
    return costs.predict(layers, batch, change)


def _fused(selection: Selection, solution: Solution, batch: int) -> dict[str, Any]:
    """What architecture.json says of fusion; nothing where it was not asked for."""
    if selection.fusion is None:
        return {}
    fusion, layers = selection.fusion, choices_of(solution)
    runs, problem = fusion.runs(solution), selection.problem(batch)
    totals, missed = problem.totals(solution.choice), []
    for one in selection.served:
        for name, error in fusion.pairwise_error(runs, layers, one.costs, one.at(batch)).items():
            for limit in problem.constraints:
                if limit.resource == name + one.suffix and limit.max is not None:
                    over = float(totals[limit.resource]) + error > limit.max * (1 + 1e-9)
                    missed += [limit.label] if over else []
    summary = fusion.summary(runs, layers, selection.costs, batch, missed)
    return {"fuse": [list(run) for run in runs], "fusion": summary}


def _also(selection: Selection, one: Served, solution: Solution, batch: int) -> dict[str, Any]:
    """The predictions in a further workload."""
    child = _predicted(selection, one.costs, solution, one.at(batch))
    return {
        "workload": asdict(one.costs.work),
        "goal": {name: _text(getattr(one.goal, name)) for name in LIMITS if getattr(one.goal, name)},
        "predicted": asdict(child) | {"speedup": child.tokens_per_second / one.parent.tokens_per_second},
        "parent_predicted": asdict(one.parent),
        "extrapolated": one.costs.extrapolated(choices_of(solution), one.at(batch)),
    }


def _text(target: Target | None) -> str | float | None:
    """A relative target as text ("2x"), an absolute one as its number."""
    if target is None:
        return None
    return str(target) if target.relative else target.value


def open_costs(library: Library, gpu: str, name: str | None, engine: str = "puzzle") -> CostTable | EngineModel:
    """Measured costs of our own runtime, or the fitted model of a serving engine."""
    if engine != "puzzle":
        return open_engine(engine, gpu)
    shapes = {(kind, library.variant(kind, v)["shape"]) for kind in KINDS for v in library.variants(kind)}
    needs = [(kind, shape) for kind, shape in sorted(shapes) if shape != "none"]
    needs.append(("head", library.facts["model"]["head_shape"]))
    return find_costs(gpu, name, [library.root / "costs", PACKAGED], needs)
