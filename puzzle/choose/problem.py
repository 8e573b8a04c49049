"""A goal on a library as a selection problem: layers, limits, counts and pairs at any batch size. Needs no torch.

In words: every layer takes one cell, a variant in each slot. A cell costs seconds of the workload at a batch size, bytes of
weights and cache, and a score (the KL of that replacement alone). Minimise the sum of scores within the goal's limits.
Throughput b·output_len / Σ seconds >= target is linear at fixed b. Which b: any, for a goal of throughput, so that parent and
child are compared at their own best; else the number of requests at once that is asked for, by default the parent's best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from puzzle.base.units import parse_layers
from puzzle.base.workload import Workload
from puzzle.choose.cells import Cell, layer_cells
from puzzle.choose.context import Around, Interactions
from puzzle.choose.cost_model import CostModel, Stack
from puzzle.choose.fusion import Fusion
from puzzle.choose.goal import LIMITS, Goal, Target, check_steps, host_label
from puzzle.choose.precision import Way
from puzzle.choose.workloads import AlsoAsked, Demand, demand
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Prediction
from puzzle.profile.all_reduce import AllReduces
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel
from puzzle.solver.interval import most, relaxed_between
from puzzle.solver.problem import Constraint, Count, Layer, Pair, Problem, Stages, Variant
from puzzle.solver.solution import Solution


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question to the solver. also: further workloads. baseline: a rule of `solve.BASELINES` in place of the optimum. explain:
    say what looser limits would buy. fusion: neighbouring FFNs without attention may become one; None: they stay apart.
    same_batch: a relative throughput is of the parent at the child's batch, not at its own best. time_limit: in seconds.
    card: bytes of the card that serves, which hold the parent's best batch, and the child where no memory limit is given.
    reduces: of the ranks that share a model, for whose cards memory is; None: one card holds it. around: scores are marginal ones of
    a child, near which the answer is; interactions: between replacements, beside their scores."""

    work: Workload
    goal: Goal
    also: tuple[AlsoAsked, ...] = ()
    backend: str = "ortools"
    time_limit: float | None = None
    baseline: str | None = None
    explain: bool = False
    fusion: Fusion | None = None
    same_batch: bool = False
    card: int | None = None
    reduces: AllReduces | None = None
    around: Around | None = None
    interactions: Interactions | None = None


def layer_label(index: int) -> str:
    return f"L{index:03d}"


@dataclass(frozen=True)
class Selection:
    """A request on a library at one set of costs, ready to be posed at any batch size. parent: at its best batch, or at the one
    that is asked for. others: further workloads. batch: the only one; None: any. whole: prices of the parent, which at a global point
    is the whole one. base: what its slicing cost, the score that all choices there begin with."""

    library: Library
    costs: CostModel
    request: Request
    parent: Prediction
    whole: CostModel
    others: tuple[Demand, ...] = ()
    batch: int | None = None
    way: Way | None = None  # where precision is chosen
    base: float = 0.0
    # The layers of a problem, by batch.
    known: dict[int, tuple[Layer, ...]] = field(default_factory=dict, compare=False)

    def chosen_by(self, way: Way) -> Selection:
        """The same request, with the same parent, at another way's prices."""
        return replace(self.priced(self.library, way), way=way)

    def at_point(self, library: Library, table: CostTable | EngineModel) -> Selection:
        """The same request, of the same parent, for children of what it was sliced to. library: of that, with its own prices."""
        assert library.point is not None
        return replace(self.priced(library, table), base=library.point.kl)

    def priced(self, library: Library, table: CostTable | EngineModel | Way) -> Selection:
        """With the choices of a library at these prices."""
        library, _ = fitted(library, table)

        def priced(costs: CostModel) -> CostModel:
            return CostModel(library, table, costs.work, costs.reduces)

        others = tuple(replace(one, costs=priced(one.costs)) for one in self.others)
        return replace(self, library=library, costs=priced(self.costs), others=others, known={})

    @property
    def goal(self) -> Goal:
        return self.request.goal

    @property
    def fusion(self) -> Fusion | None:
        return self.request.fusion

    @property
    def demands(self) -> tuple[Demand, ...]:
        """All workloads, the main one first."""
        return (Demand(suffix="", batch=None, goal=self.goal, costs=self.costs, parent=self.parent), *self.others)

    @cached_property
    def cells(self) -> list[dict[str, Cell]]:
        """Per layer, what it may choose, by the solver's name for it; with fusion also the twins."""
        found, every = [], layer_cells(self.library, self.way)
        for context in (self.request.around, self.request.interactions):
            every = every if context is None else context.scored(every)
        for cells in every:
            twins = [] if self.fusion is None else [cell.twin() for cell in cells if cell.lone_ffn is not None]
            found.append({cell.name: cell for cell in (*cells, *twins)})
        return found

    def chosen(self, solution: Solution) -> list[Cell]:
        """The solution's cells, layer by layer."""
        return [cells[solution.choice[layer_label(index)]] for index, cells in enumerate(self.cells)]

    def named(self, layers: Sequence[Mapping[str, str]]) -> dict[str, str]:
        """{slot: variant} of every layer, as the solver calls them; "" for what a layer has no cell of."""
        return {
            layer_label(index): next((name for name, cell in cells.items() if dict(cell.variants) == own), "")
            for index, (cells, own) in enumerate(zip(self.cells, layers, strict=True))
        }

    @property
    def batches(self) -> list[int]:
        """The batch sizes that were measured, between which all are tried; or the only one."""
        return self.costs.batches if self.batch is None else [self.batch]

    def problems(self) -> dict[str, Problem]:
        """The selection problem at each of `batches`. Raises UserError where the goal's structure is impossible."""
        return {str(b): self.problem(b) for b in self.batches}

    def problem(self, batch: int, choice: Mapping[str, str] | None = None) -> Problem:
        """The selection problem at one batch size. choice: what the layers take, where nothing else is to be looked at."""
        goal = self.goal
        pinned = self._layers("pinned", goal.pinned)
        alike = self._layers("alike", goal.alike)
        return Problem(
            layers=self._layers_at(batch) if choice is None else self._priced(batch, choice),
            constraints=self.constraints(batch),
            counts=self._counts(),
            pairs=self._pairs(batch) if choice is None else (),
            fixed=self._fixed(batch),
            pins={
                layer_label(i): tuple(name for name, cell in self.cells[i].items() if cell.is_parent) for i in pinned
            },
            equal=(tuple(layer_label(i) for i in alike),) if alike else (),
            stages=None
            if goal.stages is None
            else Stages(resource="seconds", count=goal.stages, tolerance=goal.stage_tolerance),
        )

    def relaxed(self, low: int, high: int) -> Problem:
        """What every choice at a batch from `low` to `high` meets, measured batches at most at the ends: amounts are linear in the
        batch there, but for what no choice changes, which is looked at for every batch."""
        one = self.problem(low)
        if low == high:
            return one
        shares = [self._shares(b) for b in range(low, high + 1)]
        fixed = {str(n): min(values) for n, values in enumerate(zip(*shares, strict=True))}
        return relaxed_between(one, self.problem(high), fixed)

    def _shares(self, batch: int) -> list[float]:
        """Of every limit, what no choice changes."""
        fixed = self._fixed(batch)
        return [fixed[limit.resource] / most(limit) for limit in self.constraints(batch)]

    def _layers_at(self, batch: int) -> tuple[Layer, ...]:
        if batch not in self.known:
            self.known[batch] = self._priced(batch)
        return self.known[batch]

    def _priced(self, batch: int, choice: Mapping[str, str] | None = None) -> tuple[Layer, ...]:
        found: dict[int, dict[str, float]] = {}
        layers = []
        for index, (cells, kinds) in enumerate(zip(self.cells, self._kinds, strict=True)):
            variants, label = [], layer_label(index)
            for name in cells if choice is None else [choice[label]]:
                kind = kinds[name]
                if id(kind) not in found:
                    found[id(kind)] = self._resources(kind, batch)
                variants.append(Variant(name=name, score=cells[name].score, resources=found[id(kind)]))
            layers.append(Layer(name=label, variants=tuple(variants)))
        return tuple(layers)

    @cached_property
    def _kinds(self) -> list[dict[str, list[Stack]]]:
        """Per layer and cell, its costs in every workload; cells that cost the same have the same list."""
        seen: dict[tuple[object, ...], list[Stack]] = {}
        found = []
        for index, cells in enumerate(self.cells):
            kinds = {}
            for name, cell in cells.items():
                first = index == 0  # an engine may treat the first layer differently
                key = (tuple(cell.sub_blocks.items()), tuple(cell.precisions.items()), first)
                if key not in seen:
                    seen[key] = [one.costs.layer(cell.sub_blocks, index, cell.precisions) for one in self.demands]
                kinds[name] = seen[key]
            found.append(kinds)
        return found

    def _fixed(self, batch: int) -> dict[str, float]:
        """What no choice changes."""
        fixed = self.costs.fixed(batch)
        for other in self.others:
            fixed |= other.timed(other.costs.fixed(other.at(batch)))
        return fixed | {"cached_bytes": fixed["memory_bytes"]}

    def _resources(self, kind: list[Stack], batch: int) -> dict[str, float]:
        own, *others = kind
        found = own.resources(batch)
        for other, stack in zip(self.others, others, strict=True):
            found |= other.timed(stack.resources(other.at(batch)))
        if self.goal.cached_tokens is not None:
            found["cached_bytes"] = own.cached_bytes(self.goal.cached_tokens)
        return found

    def _pairs(self, batch: int) -> tuple[Pair, ...]:
        """What fusing neighbours changes, in every workload; or their interactions."""
        if self.request.interactions is not None:
            return self.request.interactions.pairs([layer_label(index) for index in range(len(self.cells))])
        if self.fusion is None:
            return ()
        labelled = [(layer_label(index), list(cells.values())) for index, cells in enumerate(self.cells)]
        return self.fusion.pairs(labelled, {one.suffix: (one.costs, one.at(batch)) for one in self.demands})

    def _layers(self, option: str, text: str | None) -> list[int]:
        return [] if text is None else parse_layers(option, text, self.library.num_layers)

    def constraints(self, batch: int) -> tuple[Constraint, ...]:
        """The limits of all workloads; those of further ones carry their suffix."""
        demands = self.demands
        if self.request.same_batch:
            there = self.whole.predict(self.whole.library.origin.layers, batch)
            demands = (replace(demands[0], parent=there), *demands[1:])
        found = [c for one in demands for c in limits_of(one, one.at(batch))]
        goal = self.goal
        if goal.cached_tokens is not None:
            room = goal.limits["memory"].absolute(self.parent.memory_bytes)
            found.append(Constraint(resource="cached_bytes", max=float(room), name="cached_tokens"))
        return tuple(found)

    def _counts(self) -> tuple[Count, ...]:
        found = [] if self.request.around is None else [self.request.around.count(self.cells, layer_label)]
        if self.goal.keep_attention is None:
            return tuple(found)
        cells = frozenset(
            (layer_label(index), name)
            for index, cells in enumerate(self.cells)
            for name, cell in cells.items()
            if cell.attends
        )
        return (*found, Count(name="keep_attention", cells=cells, min=self.goal.keep_attention))


def limits_of(one: Demand, batch: int) -> list[Constraint]:
    """The rows of `LIMITS` that one workload has a target for."""
    found = []
    for limit in LIMITS:
        target = one.goal.limits.get(limit.option)
        if target is not None and (limit.of_workload or not one.suffix):
            most = limit.bound(target.absolute(limit.own(one.parent)), batch, one.costs.work)
            suffix = one.suffix if limit.of_workload else ""
            found.append(Constraint(resource=limit.resource + suffix, max=float(most), name=limit.option + one.suffix))
            if one.costs.has_host and limit.paced:
                name = host_label(limit.option + one.suffix)
                found.append(Constraint(resource=f"host_{limit.resource}{suffix}", max=float(most), name=name))
    return found


def fitted(library: Library, table: object) -> tuple[Library, list[str]]:
    """`library` without the variants that an engine's fit has no price for, and the names of these."""
    if not isinstance(table, EngineModel):
        return library, []
    return library.where(lambda sub_block: table.unfitted(sub_block) is None)


def select(
    library: Library, table: CostTable | EngineModel | Way, request: Request, *, free: bool = False
) -> Selection:
    """free: the batch is free whatever the goal. Raises UserError for a workload or a batch that the costs do not cover."""
    library, _ = fitted(library, table)
    costs, goal = CostModel(library, table, request.work, request.reduces), request.goal
    check_steps(goal, request.work)
    memory = goal.limits.get("memory")
    card = request.card if memory is None or memory.relative else int(memory.value)
    parent = costs.best_parent(card)
    batch = goal.concurrency
    if (
        batch is None
        and not free
        and not any("throughput" in one.limits for one in (goal, *(a.goal for a in request.also)))
    ):
        batch = parent.batch
    if batch is not None:
        parent = costs.predict(library.origin.layers, batch)
    limit = card if memory is None else int(memory.absolute(parent.memory_bytes))
    others = tuple(demand(one, library, table, limit, request.reduces) for one in request.also)
    if memory is None and card is not None:
        limits = {**goal.limits, "memory": Target(value=float(card), relative=False)}
        request = replace(request, goal=replace(goal, limits=limits))
    return Selection(library, costs, request, parent, costs, others, batch, table if isinstance(table, Way) else None)
