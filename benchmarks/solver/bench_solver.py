"""Time to proven optimality, and what exactness buys, on seeded synthetic libraries.

Instances: every layer offers 6 attention × 9 FFN variants (or 4 × 4 where a case says 80 × 16). Scores are convex in width,
differ from layer to layer (log-normal), and removing attention is cheap in late layers; latencies carry 1 % noise; limits
stand at 40, 50 or 60 % of the way from the least to the most that choices can use. Times are wall seconds of one call,
reading the instance into a Problem excluded, "gap" is proven: 0, or at most 1e-6 of the objective where a time limit hit.

  knapsacks-2, -3   32, 80 and 126 layers × 54, two or three limits, 3 seeds × 3 tightnesses
  fusion            126 × 54, two limits (runtime at 20, 30, 40 %, so that fusing matters), neighbours without attention fuse: their FFNs together cost less, by widths
  sparse-pairs      126 × 54, two limits, 200 pairs of random cells, layers anywhere, scores of either sign
  sweep             nine batch sizes, one answer
  pareto            50 throughput targets × nine batch sizes
  diverse           10 choices at least 20 layers apart, 80 × 16, runtime at 33 % and memory at 40 %, where both bind; at
                    most 60 s for each
  baselines         objective of simple rules over the optimum, three libraries

    python benchmarks/solver/bench_solver.py --out benchmarks/results/solver.csv
"""

from __future__ import annotations

import csv
import platform
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click
import numpy as np

from puzzle.base.machine import cpu_name
from puzzle.solver.baselines import greedy, most, only, random_feasible, uniform
from puzzle.solver.diverse import diverse
from puzzle.solver.pareto import frontier
from puzzle.solver.problem import Constraint, Layer, Pair, Problem, Variant
from puzzle.solver.solve import solve
from puzzle.solver.sweep import sweep

ATTENTION = {
    "kv8": (1.0, 8),
    "kv4": (0.9, 4),
    "kv2": (0.85, 2),
    "kv1": (0.82, 1),
    "linear": (0.35, 0),
    "none": (0.0, 0),
}
DAMAGE = {"kv8": 0.0, "kv4": 0.02, "kv2": 0.06, "kv1": 0.15, "linear": 0.6, "none": 1.0}
WIDTHS = (1.0, 0.75, 0.6, 0.5, 0.35, 0.25, 0.1, 0.05, 0.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def library(num_layers: int, seed: int, batch: int = 64, small: bool = False) -> tuple[Layer, ...]:
    """Layers with scores in nats and resources runtime, memory, prefill, num_parameters; one batch size."""
    random = np.random.default_rng(seed)
    attentions = ("kv8", "kv2", "linear", "none") if small else tuple(ATTENTION)
    widths = (1.0, 0.5, 0.25, 0.0) if small else WIDTHS
    layers = []
    for i in range(num_layers):
        attention_weight = 0.02 * np.exp(0.5 * random.normal()) * (1.5 - i / num_layers)
        ffn_weight, power = 0.03 * np.exp(0.5 * random.normal()), random.uniform(1.2, 2.5)
        variants = []
        for a in attentions:
            work, kv = ATTENTION[a]
            attention_score = attention_weight * DAMAGE[a] * random.uniform(0.8, 1.2)
            for w in widths:
                noise = 1 + 0.01 * random.normal(size=2)
                weights = 0.5 * (work > 0) + 2.0 * w
                runtime = (0.6 * work + weights + batch * (0.01 * kv + 0.01 * w)) * noise[0]
                resources = {
                    "runtime": float(runtime),
                    "memory": float(weights + 0.004 * kv * batch),
                    "prefill": float((0.5 * work + 3.0 * w) * noise[1]),
                    "num_parameters": float(weights),
                }
                score = float(attention_score + ffn_weight * (1 - w) ** power * random.uniform(0.9, 1.1))
                full = a == attentions[0] and w == 1.0
                variants.append(Variant(name=f"{a}|{w:g}", score=0.0 if full else score, resources=resources))
        layers.append(Layer(name=f"L{i:03d}", variants=tuple(variants)))
    return tuple(layers)


def limits(layers: tuple[Layer, ...], resources: tuple[str, ...], tightness: float) -> tuple[Constraint, ...]:
    """Limits at `tightness` of the way from the least to the most that choices can use."""
    found = []
    for r in resources:
        low = sum(min(v.resources[r] for v in la.variants) for la in layers)
        high = sum(max(v.resources[r] for v in la.variants) for la in layers)
        found.append(Constraint(resource=r, max=low + tightness * (high - low)))
    return tuple(found)


def fused(layers: tuple[Layer, ...]) -> tuple[Pair, ...]:
    """Neighbours: when the second has no attention, both FFNs run as one and save launches, more so when they are narrow."""
    pairs = []
    for first, second in pairwise(layers):
        for a in first.variants:
            for b in second.variants:
                w, u = float(a.name.split("|")[1]), float(b.name.split("|")[1])
                if b.name.startswith("none") and w and u:
                    saving = 0.15 + 0.2 * (1 - w) * (1 - u)
                    pairs.append(Pair(a=(first.name, a.name), b=(second.name, b.name), resources={"runtime": -saving}))
    return tuple(pairs)


def sparse(layers: tuple[Layer, ...], count: int, seed: int) -> tuple[Pair, ...]:
    """Interactions of random cells: two replacements hurt more, or less, together than apart."""
    random = np.random.default_rng(1000 + seed)
    pairs: list[Pair] = []
    while len(pairs) < count:
        i, j = random.choice(len(layers), 2, replace=False)
        a, b = (layers[n].variants[random.integers(len(layers[n].variants))] for n in (i, j))
        size = 0.5 * random.normal() * min(a.score, b.score)
        if size:
            pairs.append(Pair(a=(layers[i].name, a.name), b=(layers[j].name, b.name), score=float(size)))
    return tuple(pairs)


def at_batches(num_layers: int, seed: int, throughput: float) -> dict[str, Problem]:
    """A problem per batch size: throughput is batch over runtime, memory is limited; cells of all sizes agree in score."""
    problems = {}
    for batch in BATCHES:
        layers = library(num_layers, seed, batch)
        room = limits(library(num_layers, seed, 32), ("memory",), 0.6)[0]
        constraints = (Constraint(resource="runtime", max=batch / throughput, name="throughput"), room)
        problems[str(batch)] = Problem(layers=layers, constraints=constraints)
    return problems


def fastest(num_layers: int, seed: int) -> float:
    """Throughput of the parent at its best batch size."""
    found = []
    for batch in BATCHES:
        layers = library(num_layers, seed, batch)
        found.append(batch / sum(la.variants[0].resources["runtime"] for la in layers))
    return max(found)


class Report:
    def __init__(self, out: Path):
        out.parent.mkdir(parents=True, exist_ok=True)
        self.handle = open(out, "w", newline="")  # noqa: SIM115 (closed when the program ends)
        self.writer = csv.writer(self.handle, lineterminator="\n")
        self.writer.writerow(["case", "instance", "status", "objective", "gap", "seconds", "device", "python", "date"])

    def add(self, case: str, instance: str, status: str, objective: float, gap: float, seconds: float) -> None:
        row = (case, instance, status, f"{objective:.9g}", f"{gap:.3g}", f"{seconds:.3f}")
        self.writer.writerow((*row, cpu_name(), platform.python_version(), time.strftime("%Y-%m-%d")))
        self.handle.flush()
        print(*row, flush=True)


def instances():
    for tightness in (0.4, 0.5, 0.6):
        for seed in range(3):
            yield tightness, seed, f"{int(100 * tightness)}% seed {seed}"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--only", "wanted", default=None, help="Cases, comma-separated; all by default.")
@click.option("--backend", default="ortools", show_default=True)
def main(out: Path, wanted: str | None, backend: str) -> None:
    report = Report(out)
    cases = wanted.split(",") if wanted else None

    def timed(case: str, instance: str, problem: Problem) -> None:
        begin = time.perf_counter()
        found = solve(problem, backend, 120.0)
        report.add(case, instance, found.status, found.objective, found.gap, time.perf_counter() - begin)

    for num_rows, case in ((2, "knapsacks-2"), (3, "knapsacks-3")):
        if cases is None or case in cases:
            for num_layers in (32, 80, 126):
                for tightness, seed, name in instances():
                    layers = library(num_layers, seed)
                    chosen = limits(layers, ("runtime", "memory", "prefill")[:num_rows], tightness)
                    timed(case, f"{num_layers}x54 {name}", Problem(layers=layers, constraints=chosen))
    for case in ("fusion", "sparse-pairs"):
        if cases is None or case in cases:
            for tightness, seed, name in instances():
                layers = library(126, seed)
                pairs = fused(layers) if case == "fusion" else sparse(layers, 200, seed)
                runtime = limits(layers, ("runtime",), tightness - (0.2 if case == "fusion" else 0.0))
                chosen = runtime + limits(layers, ("memory",), tightness)
                timed(
                    case, f"126x54 {name} {len(pairs)} pairs", Problem(layers=layers, constraints=chosen, pairs=pairs)
                )
    if cases is None or "sweep" in cases:
        for seed in range(3):
            problems = at_batches(126, seed, 2.0 * fastest(126, seed))
            begin = time.perf_counter()
            label, found = sweep(problems, backend=backend)
            seconds = time.perf_counter() - begin
            best = found[label] if label else next(iter(found.values()))
            report.add(
                "sweep", f"126x54 9 sizes seed {seed} best {label}", best.status, best.objective, best.gap, seconds
            )
    if cases is None or "pareto" in cases:
        base = fastest(126, 0)
        loose = at_batches(126, 0, base)

        def problems_at(throughput: float) -> dict[str, Problem]:
            return {
                b: replace(p, constraints=(replace(p.constraints[0], max=int(b) / throughput), p.constraints[1]))
                for b, p in loose.items()
            }

        begin = time.perf_counter()
        points = frontier([base * (1 + 3 * n / 49) for n in range(50)], problems_at, backend=backend)
        seconds = time.perf_counter() - begin
        rising = all(a.solution.objective <= b.solution.objective for a, b in pairwise(points))
        status = "all optimal" if all(p.solution.status == "optimal" for p in points) and rising else "NOT EXACT"
        report.add(
            "pareto", f"126x54 9 sizes {len(points)} points", status, points[-1].solution.objective, 0.0, seconds
        )
    if cases is None or "diverse" in cases:
        for seed in range(3):
            layers = library(80, seed, small=True)
            chosen = limits(layers, ("runtime",), 0.33) + limits(layers, ("memory",), 0.4)
            problem = Problem(layers=layers, constraints=chosen)
            begin = time.perf_counter()
            found_all = diverse(problem, 10, 20, backend=backend, time_limit=60.0)
            seconds = time.perf_counter() - begin
            scores = [s.objective for s in found_all]
            proven = sum(s.status == "optimal" for s in found_all)
            gap = max(s.gap for s in found_all)
            status = f"{proven} optimal" + ("" if scores == sorted(scores) else ", NOT RISING")
            report.add("diverse", f"80x16 {len(found_all)} seed {seed}", status, scores[-1], gap, seconds)
    if cases is None or "baselines" in cases:
        for seed in range(3):
            layers = library(80, seed)
            problem = Problem(layers=layers, constraints=limits(layers, ("runtime", "memory"), 0.5))
            best = solve(problem)
            dropped = [f"{a}|{w}" for a in ("kv8", "none") for w in ("1", "0")]
            randoms = random_feasible(problem, 20)
            rules = {
                "mip": best,
                "greedy": greedy(problem),
                "uniform": uniform(problem),
                "no-op only": only(problem, dropped),
                "most parameters": most(problem, "num_parameters"),
                "best of 20 random": min(randoms, key=lambda s: s.objective),
            }
            for rule, found_one in rules.items():
                ratio = found_one.objective / best.objective
                report.add(
                    "baselines", f"80x54 seed {seed} {rule}", found_one.status, ratio, found_one.gap, found_one.seconds
                )


if __name__ == "__main__":
    main()
