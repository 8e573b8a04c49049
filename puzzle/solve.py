"""Choose one variant pair per layer: the library's scores and a cost table in, architecture.json out. Needs no torch.

In words: every layer takes one (attention, FFN) pair. The pair costs seconds of the workload at a batch size, bytes of
weights and cache, and a score (the KL of that replacement alone). Minimise the sum of scores within the goal's limits,
at the batch size that allows the smallest sum. Throughput b·output_len / Σ seconds >= target is linear at fixed b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from puzzle import __version__
from puzzle.also import LIMITS, Also, Served, served
from puzzle.costs import PACKAGED, CostTable, Workload, find_costs
from puzzle.engine import EngineModel, open_engine
from puzzle.errors import UserError
from puzzle.fuse.price import PLUS, Fusion
from puzzle.goal import Goal, Target, parse_layers
from puzzle.library import KINDS, PARENT, Library
from puzzle.predict import Choice, CostModel, Prediction
from puzzle.solver.baselines import greedy, most, only, random_feasible, uniform
from puzzle.solver.diverse import diverse
from puzzle.solver.explain import prices
from puzzle.solver.problem import Constraint, Count, Layer, Pair, Problem, ProblemError, Stages, Variant
from puzzle.solver.solution import Solution
from puzzle.solver.sweep import sweep
from puzzle.why import why_infeasible

NO_OP_ONLY = [f"{attention}|{ffn}" for attention in (PARENT, "none") for ffn in (PARENT, "none")]
BASELINES: dict[str, Callable[[Problem], Solution]] = {
    "greedy": greedy,
    "uniform": uniform,
    "random": lambda problem: min(random_feasible(problem, 20), key=lambda s: s.objective, default=uniform(problem)),
    "no-op": lambda problem: only(problem, NO_OP_ONLY, "no-op only"),
    "most-parameters": lambda problem: most(problem, "num_parameters"),
}


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


def choices_of(solution: Solution) -> list[Choice]:
    """The solution's pairs, layer by layer."""
    split = [solution.choice[name].split("|") for name in sorted(solution.choice)]
    return [{"attention": attention, "ffn": ffn.removesuffix(PLUS)} for attention, ffn in split]


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
    same = costs.predict([dict.fromkeys(KINDS, PARENT)] * library.num_layers, batch)
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
