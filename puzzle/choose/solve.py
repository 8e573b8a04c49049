"""Choose one variant per layer and slot: the library's scores and a cost table in, an `Architecture` out. Needs no torch.

`problem.py` poses the question at every batch size; the answer is the batch size that allows the smallest sum of scores.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from puzzle import __version__
from puzzle.base.errors import UserError
from puzzle.base.files import finite
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.variant import PARENT
from puzzle.choose.cells import Cell
from puzzle.choose.cost_model import CostModel
from puzzle.choose.goal import LIMITS, host_label
from puzzle.choose.infeasible import why_infeasible
from puzzle.choose.precision import Precisions
from puzzle.choose.problem import Request, Selection, layer_label, select
from puzzle.choose.workloads import Demand
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Also, Architecture, Prediction
from puzzle.profile.cost_table import PACKAGED, CostTable, find_costs
from puzzle.profile.engine import EngineModel, open_engine
from puzzle.profile.parts import Head, Part, ends_of, priced_as, shared_name
from puzzle.solver.baselines import best_of, greedy, most, only, random_feasible, uniform
from puzzle.solver.diverse import diverse
from puzzle.solver.explain import prices, without
from puzzle.solver.interval import best_between
from puzzle.solver.problem import Problem
from puzzle.solver.solution import Solution, certified
from puzzle.solver.solve import solve

Rule = Callable[[Selection, Problem], Solution]


def _no_op_only(selection: Selection, problem: Problem) -> Solution:
    """Sub-blocks stay or go, nothing between."""
    allowed = {
        name
        for cells in selection.cells
        for name, cell in cells.items()
        if all(cell.variants[s] == PARENT or isinstance(b, NoOp) for s, b in cell.sub_blocks.items())
    }
    return only(problem, sorted(allowed), "no-op only")


def _depth(selection: Selection, problem: Problem) -> Solution:
    """Whole layers go, first those whose removal alone has the lowest score (Shortened LLaMA's order by perplexity, arXiv 2402.02834)."""
    free = [(n, cells) for n, cells in enumerate(selection.cells) if layer_label(n) not in problem.pins]
    removed = [(c.score, layer_label(n), name) for n, cells in free for name, c in cells.items() if c.is_nothing]
    choices = [_whole(selection)]
    for _, layer, name in sorted(removed):
        choices.append(choices[-1] | {layer: name})
    return best_of(problem, choices, "depth")


def _uniform_width(selection: Selection, problem: Problem) -> Solution:
    """FFNs of one variant in every layer that may have it, beside the parent's other sub-blocks."""
    widths: dict[str, dict[str, str]] = {}
    for n, cells in enumerate(selection.cells):
        for name, cell in cells.items():
            if layer_label(n) not in problem.pins and all(v == PARENT for s, v in cell.variants.items() if s != "ffn"):
                widths.setdefault(cell.variants.get("ffn", PARENT), {})[layer_label(n)] = name
    return best_of(problem, [_whole(selection) | width for width in widths.values()], "uniform-width")


def _whole(selection: Selection) -> dict[str, str]:
    """The parent, as the solver calls its cells."""
    return {layer_label(n): next(k for k, c in cells.items() if c.is_parent) for n, cells in enumerate(selection.cells)}


BASELINES: dict[str, Rule] = {
    "depth": _depth,
    "greedy": lambda _, problem: greedy(problem),
    "uniform": lambda _, problem: uniform(problem),
    "uniform-width": _uniform_width,
    "random": lambda _, problem: min(random_feasible(problem, 20), key=lambda s: s.objective, default=uniform(problem)),
    "no-op": _no_op_only,
    "most-parameters": lambda _, problem: most(problem, "num_parameters"),
}


def solve_library(
    library: Library,
    table: CostTable | EngineModel | Precisions,
    request: Request,
    points: Sequence[tuple[Library, CostTable | EngineModel]] | None = None,
) -> Architecture:
    """points: global ones, `library` itself or libraries of what its parent was sliced to, with their prices: the best of all counts.
    Raises UserError when the goal cannot be met, with what can be."""
    first, *more = table.ways if isinstance(table, Precisions) else [table]
    number = 1 + len(more) if points is None else len(points)
    share = None if request.time_limit is None else request.time_limit / number
    whole = select(library, first, replace(request, time_limit=share))
    if points is None:
        others = [whole, *(whole.chosen_by(way) for way in more)]  # type: ignore[arg-type]
    else:
        others = [whole if one.point is None else whole.at_point(one, costs) for one, costs in points]
    selection, lowest, best = whole, math.inf, None
    solutions: dict[int, Solution] = {}
    every: list[tuple[float, Solution]] = []
    told = []
    for other in others:
        found = choose(other, math.inf if points is not None else lowest)
        every += [(other.base, solution) for solution in found[1].values()]
        score = math.inf if found[0] is None else found[1][found[0]].objective + other.base
        told.append(_point(other, finite(score)))
        if best is None or score < lowest:
            selection, (best, solutions), lowest = other, found, score
    if best is None:  # of the last one, which has most to choose from, or is the smallest
        asked = replace(selection.request, time_limit=request.time_limit)
        sizes = _sizes(selection.library)
        where = "" if points is None else f"no child was found at any point; at the smallest ({sizes}): "
        raise UserError(where + why_none(replace(selection, request=asked, known={}), solutions))
    batch, solution = best, solutions[best]
    unproven = [base + other.bound for base, other in every if other.status in ("feasible", "time_limit")]
    if len(others) > 1 and unproven:  # another one may have had something better
        solution = replace(solution, status="feasible", bound=min(unproven) - selection.base)
    if request.baseline is None:
        batch, solution = _faster(selection, batch, solution)
    bought = [asdict(price) for price in prices(selection.problem(batch), solution)] if request.explain else None
    return replace(
        architecture(selection, batch, solution),
        objective_per_batch={str(b): s.objective + selection.base for b, s in sorted(solutions.items()) if s.choice},
        prices=None if bought is None else tuple(bought),
        points=None if points is None else tuple(told),
    )


def _sizes(library: Library) -> str:
    structure = library.structure
    return (
        f"hidden {structure.hidden_size}, depth {structure.num_layers}" if library.point is None else library.point.told
    )


def _point(selection: Selection, objective: float | None) -> dict[str, Any]:
    """What came out at one global point. objective: None where no child was found."""
    library = selection.library
    return {"library": str(library.root), "sizes": _sizes(library), "base": selection.base, "objective": objective}


def solve_diverse(
    library: Library, table: CostTable | EngineModel, request: Request, count: int, min_distance: int
) -> list[Architecture]:
    """Up to `count` architectures at the best batch size, each at least `min_distance` layers from all earlier ones; the request's
    time limit is for each. Raises UserError when there is none, or for a distance that there cannot be."""
    selection = select(library, table, request)
    best, _ = chosen(selection)
    problem = selection.problem(best)
    found = diverse(problem, count, min_distance, backend=request.backend, time_limit=request.time_limit)
    return [architecture(selection, best, solution) for solution in found]


def choose(selection: Selection, cutoff: float = math.inf) -> tuple[int | None, dict[int, Solution]]:
    """(best batch or None, solution per batch that was looked at), by the solver over all batches or by a simple rule over
    `Selection.batches`. cutoff: a score that an answer by the solver has to be below."""
    request = selection.request
    if request.baseline is None:
        how = {"backend": request.backend, "time_limit": request.time_limit, "cutoff": cutoff}
        return best_between(selection.batches, selection.problem, selection.relaxed, **how)
    rule = BASELINES[request.baseline]
    solutions = {batch: rule(selection, selection.problem(batch)) for batch in selection.batches}
    feasible = [batch for batch, solution in solutions.items() if solution.choice]
    return min(feasible, key=lambda batch: solutions[batch].objective, default=None), solutions


def chosen(selection: Selection) -> tuple[int, dict[int, Solution]]:
    """`choose`, where there is an answer. Raises UserError, with what can be met, where there is none."""
    best, solutions = choose(selection)
    if best is None:
        raise UserError(why_none(selection, solutions))
    return best, solutions


def why_none(selection: Selection, solutions: Mapping[int, Solution]) -> str:
    request = selection.request
    if request.baseline is not None:
        way_out = "take uniform, which changes attention too" if request.baseline == "uniform-width" else "leave it out"
        return f"`baseline` {request.baseline} finds no child that meets the goal: {way_out}, or relax the goal"
    if any(s.status == "time_limit" for s in solutions.values()):
        return f"no child was found in `time_limit` {request.time_limit:g} s: allow more"
    return why_infeasible(_telling(selection), selection.demands)


def _telling(selection: Selection) -> dict[str, Problem]:
    """The problems that say how far a limit could go: at every measured batch and, where all but throughput can be met at one and
    not at the next, at the last batch between where it can, which is the fastest."""
    labels = {limit.option + one.suffix for limit in LIMITS if limit.larger for one in selection.demands}
    labels |= {host_label(label) for label in labels}
    problems = selection.problems()

    def can_be_met(batch: int) -> bool:
        return bool(solve(without(selection.problem(batch), labels)).choice)

    for low, high in pairwise(selection.batches):
        if can_be_met(low) and not can_be_met(high):
            last = bisect_left(range(low, high), True, key=lambda batch: not can_be_met(batch)) + low - 1
            problems[str(last)] = selection.problem(last)
    return problems


def _faster(selection: Selection, batch: int, solution: Solution) -> tuple[int, Solution]:
    """The same score with more tokens/s, where a tie allows it: another cell of a layer, then the same choice at another batch."""
    problem, choice = selection.problem(batch), dict(solution.choice)
    for layer in problem.layers:
        own = next(v for v in layer.variants if v.name == choice[layer.name])
        tied = [v for v in layer.variants if v.score == own.score and v.resources["seconds"] < own.resources["seconds"]]
        for other in sorted(tied, key=lambda v: v.resources["seconds"]):
            changed = choice | {layer.name: other.name}
            if not problem.violated(changed) and problem.totals(changed)["score"] <= problem.totals(choice)["score"]:
                choice = changed
                break
    best = _certified(problem, choice, solution)
    if selection.batch is not None or selection.fusion is not None:
        return batch, best
    cells, costs = selection.chosen(best), selection.costs
    model = costs.model([cell.sub_blocks for cell in cells], [cell.precisions for cell in cells])
    speeds = {b: model.predict(b).tokens_per_second for b in costs.every_batch}
    for other_batch in sorted(speeds, key=speeds.__getitem__, reverse=True):
        there = selection.problem(other_batch, choice)
        if other_batch == batch or not there.violated(choice):
            return other_batch, _certified(there, choice, solution)
    raise AssertionError("the choice holds at its own batch")


def _certified(problem: Problem, choice: dict[str, str], solution: Solution) -> Solution:
    """`solution` with a choice of the same score."""
    proven, told = solution.status == "optimal", {"seconds": solution.seconds, "solver": solution.solver}
    return certified(problem, choice, proven=proven, bound=solution.bound, **told)


def architecture(selection: Selection, batch: int, solution: Solution) -> Architecture:
    """One solution at one batch size, with what is promised for it."""
    library, costs, parent = selection.library, selection.costs, selection.parent
    cells, structure = selection.chosen(solution), selection.whole.library.origin
    whole, point = structure.layers, None if library is selection.whole.library else library.point
    child, layers = predicted(selection, costs, cells, batch), [cell.sub_blocks for cell in cells]
    same = selection.whole.predict(whole, batch)
    extrapolated = [*_extrapolated(costs, cells, batch), *selection.whole.extrapolated(whole, parent.batch)]
    found = Architecture(
        puzzle=__version__,
        parent_fingerprint=library.fingerprint,
        synthetic_scores=bool(library.facts.get("synthetic_scores")),
        parent=library.origin,
        point=None if point is None else asdict(point),
        whole=None if point is None else structure,
        layers=tuple(cell.choices(costs.table.precision) for cell in cells),
        goal=selection.goal.plain(),
        workload=costs.work,
        costs=selection.whole.facts,
        tp=costs.tp,
        kv_dtype=None if selection.way is None else costs.way.cache,
        status=solution.status,
        objective=solution.objective + selection.base,
        bound=finite(solution.bound + selection.base),
        gap=finite(solution.gap),
        slack=solution.slack,
        seconds=solution.seconds,
        solver=solution.solver,
        predicted=child,
        parent_predicted=parent,
        speedup=child.tokens_per_second / parent.tokens_per_second,
        speedup_at_same_batch=child.tokens_per_second / same.tokens_per_second,
        extrapolated=tuple(sorted(set(extrapolated))),
        also=tuple(_also(selection, one, cells, batch) for one in selection.others),
        host_pace=costs.host_pace(layers, batch, _change(selection, costs, cells, batch)),
    )
    return found if selection.fusion is None else _fused(selection, found, solution, cells, batch)


def predicted(selection: Selection, costs: CostModel, cells: Sequence[Cell], batch: int) -> Prediction:
    """Of the child as it will run: fused, where it was solved so."""
    layers, change = [cell.sub_blocks for cell in cells], _change(selection, costs, cells, batch)
    return costs.predict(layers, batch, change, [cell.precisions for cell in cells])


def _change(selection: Selection, costs: CostModel, cells: Sequence[Cell], batch: int) -> dict[str, float] | None:
    fusion = selection.fusion
    return None if fusion is None else fusion.change(fusion.runs(cells), cells, costs, batch)


def _extrapolated(costs: CostModel, cells: Sequence[Cell], batch: int) -> list[str]:
    return costs.extrapolated([cell.sub_blocks for cell in cells], batch, [cell.precisions for cell in cells])


def _fused(
    selection: Selection, found: Architecture, solution: Solution, cells: Sequence[Cell], batch: int
) -> Architecture:
    """With the runs that are to be fused, and which limits their whole widths miss."""
    fusion = selection.fusion
    assert fusion is not None
    runs, problem = fusion.runs(cells), selection.problem(batch)
    totals = problem.totals(solution.choice)
    missed = [
        limit.label
        for one in selection.demands
        for name, error in fusion.pairwise_error(runs, cells, one.costs, one.at(batch)).items()
        for limit in problem.constraints
        if limit.resource == name + one.suffix and limit.max is not None
        if float(totals[limit.resource]) + error > limit.max * (1 + 1e-9)
    ]
    summary = fusion.summary(runs, cells, selection.costs, batch, missed)
    return replace(found, fuse=tuple(runs), fusion=summary)


def _also(selection: Selection, one: Demand, cells: Sequence[Cell], batch: int) -> Also:
    """The predictions in a further workload."""
    child = predicted(selection, one.costs, cells, one.at(batch))
    asked = {option: target.plain() for option, target in one.goal.limits.items() if option != "memory"}
    return Also(
        workload=one.costs.work,
        goal=asked,
        predicted=child,
        parent_predicted=one.parent,
        speedup=child.tokens_per_second / one.parent.tokens_per_second,
        extrapolated=tuple(_extrapolated(one.costs, cells, one.at(batch))),
    )


def open_costs(
    library: Library, gpu: str, name: str | None, engine: str = "puzzle", tp: int = 1
) -> CostTable | EngineModel:
    """Measured costs of our own runtime, of the shares of `tp` ranks, or the fitted model of a serving engine."""
    structure = library.origin
    if engine != "puzzle":
        return open_engine(engine, gpu, (structure, structure.usual), name=name, measured=library.root / "costs")
    head: list[Part] = [end for end in ends_of(structure.share(tp)) if isinstance(end, Head)]
    needs = [*(part.shared(tp) for part in library.sub_blocks()), *head]
    found = find_costs(gpu, name and shared_name(name, tp), [library.root / "costs", PACKAGED], needs, tp)
    if tp > 1:
        _check_has(found, needs, f"`tp` {tp}", gpu, tp)
    return found


def _check_has(table: CostTable, needs: Iterable[Part], asked: str, gpu: str, tp: int) -> None:
    """Raise UserError, with what was asked for, where a table lacks one of these parts."""
    lacking = next((part for part in needs if not table.has(part)), None)
    if lacking is not None:
        raise UserError(
            f"{asked}: the cost table '{table.path.stem}' for `gpu` {gpu} has no '{priced_as(lacking)}': run {_profiling(gpu, tp, table.precision)}"
        )


def _profiling(gpu: str, tp: int, precision: str) -> str:
    flags = (f" --tp {tp}" if tp > 1 else "") + (" --fp8" if precision == "fp8" else "")
    return f"`puzzle profile LIBRARY --gpu {gpu}{flags}` on that machine"


def open_precisions(library: Library, gpu: str, name: str | None, wanted: Sequence[str], tp: int = 1) -> Precisions:
    """The tables NAME and NAME-fp8 of one device. name: in bf16. Raises UserError where one is missing, or is in another precision."""
    tables, usual = {}, name
    if usual is None:
        found = open_costs(library, gpu, None, tp=tp)
        assert isinstance(found, CostTable)
        usual = found.path.stem if found.precision != "fp8" else found.path.stem.removesuffix("-fp8")
    for precision in wanted:
        stem = shared_name(usual if precision == "bf16" else f"{usual}-{precision}", tp)
        try:
            table = open_costs(library, gpu, stem, tp=tp)
        except UserError as error:
            if any(any(root.glob(f"{gpu}*/{stem}.csv")) for root in (library.root / "costs", PACKAGED)):
                raise  # it is there, and broken
            told = f"`precision` {precision} has no cost table '{stem}' for `gpu` {gpu}"
            raise UserError(f"{told}: run {_profiling(gpu, tp, precision)}") from error
        assert isinstance(table, CostTable)
        if table.precision != precision:
            raise UserError(f"`precision` {precision}: the cost table '{stem}' for `gpu` {gpu} is in {table.precision}")
        _check_has(table, (b.shared(tp) for b in library.sub_blocks()), f"`precision` {precision}", gpu, tp)
        tables[precision] = table
    devices = sorted({table.device for table in tables.values()})
    if len(devices) > 1:
        raise UserError(f"`precision` {','.join(wanted)}: the cost tables '{usual}' are of {' and '.join(devices)}")
    return Precisions(tables=tables)
