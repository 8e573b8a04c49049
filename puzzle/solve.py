"""Choose one variant pair per layer: the library's scores and a cost table in, architecture.json out. Needs no torch.

In words: every layer takes one (attention, FFN) pair. The pair costs seconds of the workload at a batch size, bytes of
weights and cache, and a score (the KL of that replacement alone). Minimise the sum of scores within the goal's limits,
at the batch size that allows the smallest sum. Throughput b·output_len / Σ seconds >= target is linear at fixed b.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from puzzle import __version__
from puzzle.costs import PACKAGED, CostTable, Workload, find_costs
from puzzle.errors import UserError
from puzzle.goal import Goal
from puzzle.library import KINDS, PARENT, Library
from puzzle.solver.problem import Constraint, Layer, Problem, Variant
from puzzle.solver.solution import Solution

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
Choice = dict[str, str]  # {"attention": name, "ffn": name}


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the cost model says of one architecture at one batch size. memory: weights and KV cache at full context."""

    batch: int
    tokens_per_second: float
    latency_seconds: float
    ttft_seconds: float
    tpot_seconds: float
    memory_bytes: int
    kv_bytes_per_token: int
    num_parameters: int


class CostModel:
    """Seconds and bytes of architectures made of one library's variants, for one workload."""

    def __init__(self, library: Library, table: CostTable, work: Workload):
        self.library, self.table, self.work = library, table, work
        model = library.facts["model"]
        if work.input_len + work.output_len > model["max_length"]:
            raise UserError(
                f"--input-len {work.input_len} + --output-len {work.output_len} exceed the parent's context of "
                f"{model['max_length']}"
            )
        self.bytes_per_element = DTYPE_BYTES[table.dtype]
        self.batches = table.batches
        head = model["head_shape"]
        self._fixed_parts = [("embedding", head), ("head", head)]
        parent = [(kind, library.variant(kind, PARENT)["shape"]) for kind in KINDS] * library.num_layers
        middle = work.input_len + work.output_len // 2
        self._factors = {
            b: (
                table.whole_over_parts(parent + self._fixed_parts, "prefill", b, work.input_len),
                table.whole_over_parts(parent + self._fixed_parts, "decode", b, middle),
            )
            for b in self.batches
        }
        self._seconds: dict[tuple[str, str, int], tuple[float, float]] = {}

    def part_seconds(self, kind: str, shape: str, batch: int) -> tuple[float, float]:
        """(prefill, all decode steps) of one part in this workload, the whole-over-parts factor included."""
        key = (kind, shape, batch)
        if key not in self._seconds:
            prefill, decode = self._factors[batch]
            self._seconds[key] = (
                prefill * self.table.seconds(kind, shape, "prefill", batch, self.work.input_len),
                decode * self.table.decode_seconds(kind, shape, batch, self.work),
            )
        return self._seconds[key]

    def variant_bytes(self, kind: str, name: str, batch: int) -> int:
        facts = self.library.variant(kind, name)
        length = self.work.input_len + self.work.output_len
        cached = length if facts["window"] is None else min(length, facts["window"])
        return self.bytes_per_element * (facts["num_parameters"] + facts["kv_elements_per_token"] * cached * batch)

    def resources(self, choice: Choice, batch: int) -> dict[str, float]:
        """Seconds, bytes and parameters of one layer's pair."""
        seconds = 0.0
        for kind in KINDS:
            seconds += sum(self.part_seconds(kind, self.library.variant(kind, choice[kind])["shape"], batch))
        return {
            "seconds": seconds,
            "memory_bytes": sum(self.variant_bytes(kind, choice[kind], batch) for kind in KINDS),
            "num_parameters": sum(self.library.variant(kind, choice[kind])["num_parameters"] for kind in KINDS),
        }

    def fixed(self, batch: int) -> dict[str, float]:
        """The same of what no choice changes: embedding, final norm, LM head."""
        count = self.library.facts["model"]["num_fixed_parameters"]
        return {
            "seconds": sum(sum(self.part_seconds(kind, shape, batch)) for kind, shape in self._fixed_parts),
            "memory_bytes": count * self.bytes_per_element,
            "num_parameters": count,
        }

    def predict(self, layers: list[Choice], batch: int) -> Prediction:
        prefill = decode = 0.0
        parts = [(kind, self.library.variant(kind, layer[kind])["shape"]) for layer in layers for kind in KINDS]
        for kind, shape in parts + self._fixed_parts:
            first, rest = self.part_seconds(kind, shape, batch)
            prefill, decode = prefill + first, decode + rest
        fixed = self.fixed(batch)
        facts = [self.library.variant(kind, layer[kind]) for layer in layers for kind in KINDS]
        return Prediction(
            batch=batch,
            tokens_per_second=batch * self.work.output_len / (prefill + decode),
            latency_seconds=prefill + decode,
            ttft_seconds=prefill,
            tpot_seconds=decode / max(1, self.work.output_len - 1),
            memory_bytes=int(fixed["memory_bytes"])
            + sum(self.variant_bytes(kind, layer[kind], batch) for layer in layers for kind in KINDS),
            kv_bytes_per_token=self.bytes_per_element * sum(f["kv_elements_per_token"] for f in facts),
            num_parameters=int(fixed["num_parameters"]) + sum(f["num_parameters"] for f in facts),
        )

    def best_parent(self, memory: int | None) -> Prediction:
        """The parent at its own best batch that fits `memory` (at the smallest batch when none does)."""
        parent = [dict.fromkeys(KINDS, PARENT)] * self.library.num_layers
        found = [self.predict(parent, b) for b in self.batches]
        fitting = [p for p in found if memory is None or p.memory_bytes <= memory] or found[:1]
        return max(fitting, key=lambda p: p.tokens_per_second)


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


def build_problem(library: Library, costs: CostModel, goal: Goal, batch: int, parent: Prediction) -> Problem:
    """The selection problem at one batch size."""
    constraints = []
    if goal.throughput is not None:
        wanted = goal.throughput.absolute(parent.tokens_per_second)
        constraints.append(
            Constraint(resource="seconds", max=batch * costs.work.output_len / wanted, name="throughput")
        )
    if goal.latency is not None:
        constraints.append(Constraint(resource="seconds", max=goal.latency, name="latency"))
    if goal.memory is not None:
        constraints.append(Constraint(resource="memory_bytes", max=float(goal.memory), name="memory"))
    if goal.max_parameters is not None:
        constraints.append(Constraint(resource="num_parameters", max=float(goal.max_parameters), name="params"))
    seen: dict[str, dict[str, float]] = {}
    layers = []
    for index, pairs in enumerate(layer_choices(library)):
        variants = []
        for choice, score in pairs:
            name = pair_name(choice)
            if name not in seen:
                seen[name] = costs.resources(choice, batch)
            variants.append(Variant(name=name, score=score, resources=seen[name]))
        layers.append(Layer(name=f"L{index:02d}", variants=tuple(variants)))
    return Problem(layers=tuple(layers), constraints=tuple(constraints), fixed=costs.fixed(batch))


def choices_of(solution: Solution) -> list[Choice]:
    """The solution's pairs, layer by layer."""
    split = [solution.choice[name].split("|") for name in sorted(solution.choice)]
    return [{"attention": attention, "ffn": ffn} for attention, ffn in split]


def solve_library(
    library: Library,
    table: CostTable,
    work: Workload,
    goal: Goal,
    *,
    backend: str = "ortools",
    time_limit: float | None = None,
) -> dict[str, Any]:
    """The architecture as architecture.json has it. Raises UserError when the goal cannot be met, with what can be."""
    from puzzle.solver.sweep import sweep

    goal.check()
    costs = CostModel(library, table, work)
    parent = costs.best_parent(goal.memory)
    problems = {str(b): build_problem(library, costs, goal, b, parent) for b in costs.batches}
    best, solutions = sweep(problems, backend=backend, time_limit=time_limit)
    if best is None:
        raise UserError(explain_infeasible(problems, costs, goal, parent))
    solution = solutions[best]
    layers = choices_of(solution)
    child = costs.predict(layers, int(best))
    same = costs.predict([dict.fromkeys(KINDS, PARENT)] * library.num_layers, child.batch)
    return {
        "puzzle": __version__,
        "library": {"parent_fingerprint": library.facts["parent"]["fingerprint"]},
        "goal": {
            "throughput": str(goal.throughput) if goal.throughput else None,
            "latency_seconds": goal.latency,
            "memory_bytes": goal.memory,
            "num_parameters": goal.max_parameters,
        },
        "workload": asdict(work),
        "costs": {"device": table.device, "dtype": table.dtype, "sha256": table.hash},
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
        "objective_per_batch": {b: s.objective for b, s in solutions.items() if s.choice},
    }


def explain_infeasible(problems: dict[str, Problem], costs: CostModel, goal: Goal, parent: Prediction) -> str:
    """One line: the limits that bind and the best that is reachable."""
    least = {r: min(_least(p, r) for p in problems.values()) for r in ("memory_bytes", "num_parameters", "seconds")}
    if goal.memory is not None and least["memory_bytes"] > goal.memory:
        return (
            f"--memory {goal.memory} bytes cannot be met: the smallest child of this library takes "
            f"{int(least['memory_bytes'])} bytes at batch {min(costs.batches)}; raise --memory or offer smaller variants"
        )
    if goal.max_parameters is not None and least["num_parameters"] > goal.max_parameters:
        return (
            f"--params {goal.max_parameters} cannot be met: the smallest child of this library has "
            f"{int(least['num_parameters'])} parameters; raise --params or offer smaller variants"
        )
    if goal.latency is not None and least["seconds"] > goal.latency:
        return (
            f"--latency {goal.latency:g} s cannot be met: the fastest child of this library takes "
            f"{least['seconds']:.4g} s; raise --latency or offer cheaper variants"
        )
    fastest = 0.0
    for batch, problem in problems.items():
        seconds = _least_seconds_within(problem, goal)
        if seconds is not None:
            fastest = max(fastest, int(batch) * costs.work.output_len / seconds)
    if goal.throughput is not None and fastest > 0:
        others = [
            n
            for n, v in (("--memory", goal.memory), ("--params", goal.max_parameters), ("--latency", goal.latency))
            if v
        ]
        within = f" within {' and '.join(others)}" if others else ""
        return (
            f"--throughput {goal.throughput} cannot be met{within}: the fastest child of this library reaches "
            f"{fastest / parent.tokens_per_second:.3g}x ({fastest:.4g} tok/s; the parent {parent.tokens_per_second:.4g}); "
            "lower --throughput or offer cheaper variants"
        )
    return "the limits cannot be met together, though each one alone can: relax --latency, --memory or --params"


def _least(problem: Problem, resource: str) -> float:
    return problem.fixed.get(resource, 0.0) + sum(
        min(v.resources[resource] for v in la.variants) for la in problem.layers
    )


def _least_seconds_within(problem: Problem, goal: Goal) -> float | None:
    """The fewest seconds under every limit but throughput; None when there is no such choice."""
    from puzzle.solver.solve import solve

    layers = tuple(
        Layer(
            name=la.name,
            variants=tuple(
                Variant(name=v.name, score=v.resources["seconds"], resources=v.resources) for v in la.variants
            ),
        )
        for la in problem.layers
    )
    kept = tuple(c for c in problem.constraints if c.name != "throughput")
    solution = solve(Problem(layers=layers, constraints=kept, fixed=problem.fixed))
    return solution.totals["seconds"] if solution.choice else None


def open_costs(library: Library, gpu: str, name: str | None) -> CostTable:
    return find_costs(gpu, name, [library.root / "costs", PACKAGED])


SHADES = "▁▂▃▄▅▆▇█"


def picture(layers: list[Choice], library: Library) -> list[str]:
    """The architecture in two lines, a column per layer: KV heads or kind of attention, and the FFN's relative size."""
    symbols = {PARENT: "█", "none": "·", "linear": "/"}
    attention = [
        symbols.get(c["attention"], c["attention"][2:] if c["attention"].startswith("kv") else "w") for c in layers
    ]
    full = library.variant("ffn", PARENT)["num_parameters"]
    ffn = []
    for choice in layers:
        share = library.variant("ffn", choice["ffn"])["num_parameters"] / full
        ffn.append(symbols.get(choice["ffn"]) or SHADES[min(7, int(share * 8))])
    return [
        "attention  " + " ".join(attention),
        "ffn        " + " ".join(ffn),
        "           █ parent   1 2 4 KV heads   w window   ▁…▇ narrower   / linear   · none",
    ]
