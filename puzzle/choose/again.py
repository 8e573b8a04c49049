"""The question that an architecture was the answer to, from what architecture.json says. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from puzzle.base.errors import UserError
from puzzle.choose.goal import BY_OPTION, GoalOptions
from puzzle.choose.options import SolveOptions
from puzzle.choose.precision import Precisions
from puzzle.choose.problem import Selection, layer_label, select
from puzzle.library.manifest import Library, score_name
from puzzle.measure.architecture import Architecture, Choice
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel

INSTEAD = "solve again, with `rounds`"


def asked_again(library: Library, solved: Architecture, asked: SolveOptions, gpu: str) -> Selection:
    """The same goal and workload at the same costs. Raises UserError for what architecture.json does not hold in full, for other costs, and
    for an architecture that does not meet its goal at these."""
    others = {
        "also": bool(solved.also),
        "stages": solved.goal.get("stages") is not None,
        "fusion": solved.fuse is not None or bool(solved.fused),
        "precision": solved.kv_dtype is not None,
        "hidden or --depth": solved.point is not None,
    }
    for name, there in others.items():
        if there:
            raise UserError(
                f"the architecture was solved with --{name}, which is not scored anew: {INSTEAD} and without it"
            )
    costs = asked.costs(library, gpu, asked.shapes)
    assert not isinstance(costs, Precisions)
    if costs.hash != solved.costs["sha256"]:
        raise UserError(
            f"`gpu` {gpu}: the architecture was solved with other costs (of {solved.costs['device']}, {solved.costs['precision']}): name "
            f"those, with `shapes` or `engine`, or {INSTEAD}"
        )
    texts = {name: None if value is None else str(value) for name, value in solved.goal.items() if name in BY_OPTION}
    rest = {name: value for name, value in solved.goal.items() if name not in BY_OPTION}
    if rest.get("cached_tokens") is not None:
        rest["cached_tokens"] = str(rest["cached_tokens"])
    goal = GoalOptions(**texts | rest).goal()
    selection = select(library, costs, asked.request(library, gpu, solved.workload, goal))
    choice = selection.named(solved.variants)
    for n, layer in enumerate(solved.layers):
        if not choice[layer_label(n)]:
            raise UserError(f"the architecture's layer {n} has {_no_choice(library, costs, n, layer)}: {INSTEAD}")
    missed = selection.problem(solved.predicted.batch).violated(choice)
    if missed:
        raise UserError(
            f"the architecture misses {', '.join(missed)} at these costs: it was solved with other options; {INSTEAD}"
        )
    return selection


def _no_choice(library: Library, costs: CostTable | EngineModel, n: int, layer: Mapping[str, Choice]) -> str:
    """Which block of a layer is none of its choices, and why: a fit has no price for it, or it was screened out."""
    told = {slot: score_name({slot: choice.variant}) for slot, choice in layer.items()}
    if isinstance(costs, EngineModel):
        for slot, choice in layer.items():
            if (what := costs.unfitted(choice.sub_block)) is not None:
                return f"{told[slot]}, for which there is no promise (`engine` {costs.engine}: {what} have not been fitted)"
    out = [name for name in told.values() if name in library.screened(n)]
    return f"{', '.join(out)}, which was screened out since"
