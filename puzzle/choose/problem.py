"""A goal on a library as a selection problem: layers, limits, counts and pairs at any batch size. Needs no torch.

In words: every layer takes one (attention, FFN) pair. The pair costs seconds of the workload at a batch size, bytes of
weights and cache, and a score (the KL of that replacement alone). Minimise the sum of scores within the goal's limits.
Throughput b·output_len / Σ seconds >= target is linear at fixed b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from puzzle.base.errors import UserError
from puzzle.base.units import parse_layers
from puzzle.base.workload import Workload
from puzzle.choose.cost_model import Choice, CostModel, Prediction
from puzzle.choose.fusion import Fusion
from puzzle.choose.goal import Goal
from puzzle.choose.workloads import Also, Served, served
from puzzle.library.manifest import KINDS, PARENT, Library
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel
from puzzle.solver.problem import Constraint, Count, Layer, Pair, Problem, ProblemError, Stages, Variant


def layer_choices(library: Library) -> list[list[tuple[Choice, float]]]:
    """Per layer, every pair with its score: the joint one where it was measured, else the sum of both."""
    every: list[list[tuple[Choice, float]]] = []
    for layer in range(library.num_layers):
        if layer not in library.layers:
            every.append([(dict.fromkeys(KINDS, PARENT), 0.0)])
            continue
        scores = library.scores(layer)

        def kl(name: str, scores=scores, layer=layer) -> float:
            if name.endswith(f"/{PARENT}"):
                return 0.0
            if name not in scores:
                raise UserError(f"layer {layer} {name} has no score: run `puzzle score {library.root}`")
            return scores[name]["kl"]

        pairs = []
        for attention in library.variants("attention"):
            for ffn in library.variants("ffn"):
                joint = scores.get(f"attention/{attention}+ffn/{ffn}")
                score = joint["kl"] if joint else kl(f"attention/{attention}") + kl(f"ffn/{ffn}")
                pairs.append(({"attention": attention, "ffn": ffn}, score))
        every.append(pairs)
    return every


def pair_name(choice: Choice) -> str:
    return f"{choice['attention']}|{choice['ffn']}"


def layer_label(index: int) -> str:
    return f"L{index:03d}"


@dataclass(frozen=True, slots=True)
class Selection:
    """A goal on a library at one set of costs, ready to be posed at any batch size. others: further workloads.

    fusion: neighbouring FFNs without attention may become one; None: they stay apart. same_batch: a relative throughput is of
    the parent at the child's batch, not at its own best."""

    library: Library
    costs: CostModel
    goal: Goal
    parent: Prediction
    others: tuple[Served, ...] = ()
    fusion: Fusion | None = None
    same_batch: bool = False

    @property
    def served(self) -> tuple[Served, ...]:
        """All workloads, the main one first."""
        return (Served(suffix="", batch=None, goal=self.goal, costs=self.costs, parent=self.parent), *self.others)

    def problems(self) -> dict[str, Problem]:
        """The selection problem at every batch size. Raises UserError where the goal's structure is impossible."""
        try:
            return {str(b): self.problem(b) for b in self.costs.batches}
        except ProblemError as error:
            raise UserError(str(error)) from error

    def problem(self, batch: int) -> Problem:
        """The selection problem at one batch size."""
        library, costs, goal = self.library, self.costs, self.goal
        seen: dict[tuple[str, bool], dict[str, float]] = {}
        layers = []
        for index, pairs in enumerate(layer_choices(library)):
            variants = []
            for choice, score in pairs:
                name = pair_name(choice)
                key = (name, index == 0)  # an engine may treat the first layer differently
                if key not in seen:
                    seen[key] = costs.resources(choice, batch, index)
                    for other in self.others:
                        seen[key] |= other.timed(other.costs.resources(choice, other.at(batch), index))
                    if goal.cached_tokens is not None:
                        seen[key]["cached_bytes"] = costs.cached_bytes(choice, goal.cached_tokens, index)
                variants.append(Variant(name=name, score=score, resources=seen[key]))
            layer = Layer(name=layer_label(index), variants=tuple(variants))
            layers.append(layer if self.fusion is None else self.fusion.twins(layer))
        fixed = costs.fixed(batch)
        for other in self.others:
            fixed |= other.timed(other.costs.fixed(other.at(batch)))
        pinned = self._layers("--pin", goal.pinned)
        alike = self._layers("--alike", goal.alike)
        return Problem(
            layers=tuple(layers),
            constraints=self.constraints(batch),
            counts=self._counts(layers),
            pairs=self._pairs(layers, batch),
            fixed=fixed | {"cached_bytes": fixed["memory_bytes"]},
            pins={layer_label(i): (f"{PARENT}|{PARENT}",) for i in pinned},
            equal=(tuple(layer_label(i) for i in alike),) if alike else (),
            stages=None
            if goal.stages is None
            else Stages(resource="seconds", count=goal.stages, tolerance=goal.stage_tolerance),
        )

    def _pairs(self, layers: list[Layer], batch: int) -> tuple[Pair, ...]:
        """What fusing neighbours changes, in every workload."""
        if self.fusion is None:
            return ()
        return self.fusion.pairs(layers, {one.suffix: (one.costs, one.at(batch)) for one in self.served})

    def _layers(self, option: str, text: str | None) -> list[int]:
        return [] if text is None else parse_layers(option, text, self.library.num_layers)

    def constraints(self, batch: int) -> tuple[Constraint, ...]:
        """The limits of all workloads; those of further ones carry their suffix."""
        served = self.served
        if self.same_batch:
            there = self.costs.predict([dict.fromkeys(KINDS, PARENT)] * self.library.num_layers, batch)
            served = (replace(served[0], parent=there), *served[1:])
        found = [c for one in served for c in _limits(one, one.at(batch))]
        goal, parent = self.goal, self.parent
        if goal.max_parameters is not None:
            most_parameters = goal.max_parameters.absolute(parent.num_parameters)
            found.append(Constraint(resource="num_parameters", max=float(most_parameters), name="params"))
        if goal.cached_tokens is not None and goal.memory is not None:
            room = goal.memory.absolute(parent.memory_bytes)
            found.append(Constraint(resource="cached_bytes", max=float(room), name="cached-tokens"))
        return tuple(found)

    def _counts(self, layers: list[Layer]) -> tuple[Count, ...]:
        if self.goal.keep_attention is None:
            return ()
        attending = {
            name
            for name in self.library.variants("attention")
            if self.library.variant("attention", name)["kv_elements_per_token"]
        }
        cells = frozenset(
            (layer.name, v.name) for layer in layers for v in layer.variants if v.name.split("|")[0] in attending
        )
        return (Count(name="keep-attention", cells=cells, min=self.goal.keep_attention),)


def _limits(one: Served, batch: int) -> list[Constraint]:
    """Throughput, latencies and memory of one workload."""
    goal, output_len, parent = one.goal, one.costs.work.output_len, one.parent
    found: list[tuple[str, str, float]] = []
    if goal.throughput is not None:
        found.append(("throughput", "seconds", batch * output_len / goal.throughput.absolute(parent.tokens_per_second)))
    for label, resource, target, own, times in (
        ("latency", "seconds", goal.latency, parent.latency_seconds, 1),
        ("ttft", "prefill_seconds", goal.ttft, parent.ttft_seconds, 1),
        ("tpot", "decode_seconds", goal.tpot, parent.tpot_seconds, max(1, output_len - 1)),
        ("memory", "memory_bytes", goal.memory, parent.memory_bytes, 1),
    ):
        if target is not None:
            found.append((label, resource, target.absolute(own) * times))
    return [Constraint(resource=r + one.suffix, max=float(value), name=label + one.suffix) for label, r, value in found]


def select(
    library: Library,
    table: CostTable | EngineModel,
    work: Workload,
    goal: Goal,
    also: Sequence[Also] = (),
    fusion: Fusion | None = None,
    same_batch: bool = False,
) -> Selection:
    """Raises UserError for a goal that is none, or a workload that the costs do not cover."""
    if not also:
        goal.check()
    return replace(selection_of(library, table, work, goal, also), fusion=fusion, same_batch=same_batch)


def selection_of(
    library: Library, table: CostTable | EngineModel, work: Workload, goal: Goal, also: Sequence[Also] = ()
) -> Selection:
    """`select`, for a goal that may be empty."""
    costs = CostModel(library, table, work)
    memory = goal.memory
    limit = None if memory is None else int(memory.absolute(costs.best_parent(None).memory_bytes))
    others = tuple(served(one, library, table, limit) for one in also)
    return Selection(library, costs, goal, costs.best_parent(limit), others)
