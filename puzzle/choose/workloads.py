"""Further workloads that the same child must serve: `--also 1024/64@8:ttft=300ms,throughput=1.5x`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.choose.cost_model import CostModel
from puzzle.choose.goal import LIMITS, Goal, GoalOptions, Target, check_steps
from puzzle.choose.precision import Way
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Prediction
from puzzle.profile.all_reduce import AllReduces
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel

# Limits that may be given for a further workload: memory is one for all, and holds in each.
ALSO_LIMITS = tuple(limit.option for limit in LIMITS if limit.of_workload and limit.option != "memory")
# Resources that differ between workloads.
TIMED = ("seconds", "prefill_seconds", "decode_seconds", "host_seconds", "host_decode_seconds", "memory_bytes")
EXAMPLE = "INPUT/OUTPUT[@BATCH]:LIMIT=GOAL,... such as 1024/64@8:ttft=300ms,throughput=1.5x"


@dataclass(frozen=True, kw_only=True, slots=True)
class AlsoAsked:
    """One more workload with limits of its own. batch: sequences at once; None is the batch of the main workload."""

    work: Workload
    batch: int | None
    goal: Goal

    @property
    def name(self) -> str:
        return f"{self.work.input_len}/{self.work.output_len}" + (f"@{self.batch}" if self.batch else "")


def parse_also(text: str) -> AlsoAsked:
    """Raises UserError unless the text is as in EXAMPLE, with every limit one of ALSO_LIMITS and given once."""
    found = re.fullmatch(r"\s*(\d+)/(\d+)(?:@(\d+))?:(.+)", text)
    if not found:
        raise UserError(f"`also` {text}: write {EXAMPLE}")
    limits: dict[str, str] = {}
    for part in found[4].split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name not in ALSO_LIMITS or name in limits:
            raise UserError(f"`also` {text}: '{part.strip()}' is no new limit; use {', '.join(ALSO_LIMITS)}, each once")
        limits[name] = value
    try:
        work = Workload(input_len=int(found[1]), output_len=int(found[2]))
        goal = GoalOptions(**limits).goal()  # type: ignore[arg-type]
        check_steps(goal, work)
    except UserError as error:
        raise UserError(f"`also` {text}: {error}") from error
    batch = int(found[3]) if found[3] else None
    if batch == 0:
        raise UserError(f"`also` {text}: a batch of 0 sequences; use 1 or more")
    return AlsoAsked(work=work, batch=batch, goal=goal)


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """A workload with its costs, its limits and the parent's own figures in it. suffix: of its resources and labels, ""
    for the main workload. batch: fixed, or None for the batch that is being tried."""

    suffix: str
    batch: int | None
    goal: Goal
    costs: CostModel
    parent: Prediction

    def at(self, batch: int) -> int:
        return self.batch or batch

    def timed(self, resources: Mapping[str, float]) -> dict[str, float]:
        return {name + self.suffix: resources[name] for name in TIMED if name in resources}


def demand(
    also: AlsoAsked,
    library: Library,
    table: CostTable | EngineModel | Way,
    memory: int | None,
    reduces: AllReduces | None = None,
) -> Demand:
    """memory: the main workload's limit in bytes, which holds here too. Raises UserError for a batch beyond those measured."""
    costs = CostModel(library, table, also.work, reduces)
    if also.batch is not None and also.batch not in costs.every_batch:
        raise UserError(
            f"`also` {also.name}: batch {also.batch} is not in the costs; use {costs.batches[0]} to {costs.batches[-1]}"
        )
    limits = dict(also.goal.limits)
    if memory is not None:
        limits["memory"] = Target(value=memory, relative=False)
    goal = Goal(limits=limits)
    return Demand(suffix=f"@{also.name}", batch=also.batch, goal=goal, costs=costs, parent=costs.best_parent(memory))
