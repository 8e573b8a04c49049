"""Simple ways to choose, on the same problem and with the same report as the MIP, to see what exactness buys.

Greedy, uniform and random know limits on resources only, random pins too: on a problem with pairs, counts or stages they may find nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace

from puzzle.solver.explain import scored_by
from puzzle.solver.problem import Constraint, Layer, Problem, Variant
from puzzle.solver.running import Running
from puzzle.solver.solution import Solution, certified, no_solution
from puzzle.solver.solve import solve


def greedy(problem: Problem) -> Solution:
    """The Puzzle paper's rule (arXiv 2411.19146, section 6.2): the budget split equally over the layers; layer by layer
    the best score that fits the layer's share, what it leaves unused passing on to the layers after it."""
    started = time.monotonic()
    left = {c.label: c.max - problem.fixed.get(c.resource, 0.0) for c in problem.constraints if c.max is not None}
    choice: dict[str, str] = {}
    for position, layer in enumerate(problem.layers):
        share = {label: amount / (len(problem.layers) - position) for label, amount in left.items()}
        fitting = [
            v
            for v in layer.variants
            if all(v.resources[c.resource] <= share[c.label] for c in problem.constraints if c.max is not None)
        ]
        pool = fitting or [min(layer.variants, key=lambda v: _pressure(v, problem, share))]
        picked = min(pool, key=lambda v: v.score)
        choice[layer.name] = picked.name
        for c in problem.constraints:
            if c.max is not None:
                left[c.label] -= picked.resources[c.resource]
    return _report(problem, [choice], started, "greedy")


def uniform(problem: Problem) -> Solution:
    """The same variant in every layer: the best score that is feasible."""
    started = time.monotonic()
    names = [v.name for v in problem.layers[0].variants]
    shared = [n for n in names if all(any(v.name == n for v in layer.variants) for layer in problem.layers)]
    return _report(problem, [{la.name: n for la in problem.layers} for n in shared], started, "uniform")


def best_of(problem: Problem, choices: list[dict[str, str]], rule: str) -> Solution:
    """The least score of those of `choices` that are feasible. rule: what made them."""
    return _report(problem, choices, time.monotonic(), rule)


def random_feasible(problem: Problem, count: int, seed: int = 0) -> list[Solution]:
    """`count` feasible choices that leave little of the budget unused: from a uniform random choice, layers are visited in
    random order and given a cheaper random variant until all limits hold, then a dearer one while they still do."""
    generator, now = random.Random(seed), Running(problem)
    limited = [c.resource for c in problem.constraints if c.max is not None]
    layers = [  # with what pins leave of them
        replace(la, variants=tuple(v for v in la.variants if v.name in problem.pins.get(la.name, (v.name,))))
        for la in problem.layers
    ]
    found: list[Solution] = []
    for _ in range(0 if now.is_hopeless() else 50 * count):
        if len(found) == count:
            break
        started = time.monotonic()
        now.begin({la.name: generator.choice(la.variants) for la in layers})
        if not _repair(layers, limited, now, generator):
            continue
        _fill(layers, now, generator)
        found.append(_report(problem, [now.names()], started, "random"))
    return found


def only(problem: Problem, allowed: Sequence[str], name: str = "only") -> Solution:
    """The best, which proves nothing of the whole problem, when every layer is restricted to the variants `allowed` that it has ("keep the block or drop it")."""
    layers = []
    for layer in problem.layers:
        kept = tuple(v for v in layer.variants if v.name in allowed and layer.name not in problem.pins)
        layers.append(replace(layer, variants=kept or layer.variants))
    present = {(layer.name, v.name) for layer in layers for v in layer.variants}
    pairs = tuple(p for p in problem.pairs if p.a in present and p.b in present)
    found = solve(replace(problem, layers=tuple(layers), pairs=pairs))
    return _report(problem, [found.choice] if found.choice else [], time.monotonic() - found.seconds, name)


def most(problem: Problem, resource: str) -> Solution:
    """As much of `resource` as the limits allow, whatever the scores ("maximise parameters")."""
    found = solve(scored_by(problem, Constraint(resource=resource), -1.0))
    return _report(
        problem, [found.choice] if found.choice else [], time.monotonic() - found.seconds, f"most {resource}"
    )


def _pressure(variant: Variant, problem: Problem, share: dict[str, float]) -> float:
    """How far a variant oversteps its share, in shares."""
    return max(
        variant.resources[c.resource] / max(share[c.label], 1e-300) for c in problem.constraints if c.max is not None
    )


def _shuffled(layers: Sequence[Layer], generator: random.Random) -> list[Layer]:
    return generator.sample(list(layers), len(layers))


def _repair(layers: Sequence[Layer], limited: Sequence[str], now: Running, generator: random.Random) -> bool:
    for _ in range(20):
        for layer in _shuffled(layers, generator):
            if now.holds():
                return True
            here = now.picked[layer.name]
            cheaper = [
                v for v in layer.variants if v is not here and all(v.resources[r] <= here.resources[r] for r in limited)
            ]
            if cheaper:
                now.put(layer.name, generator.choice(cheaper))
    return now.holds()


def _fill(layers: Sequence[Layer], now: Running, generator: random.Random) -> None:
    for layer in _shuffled(layers, generator):
        here = now.picked[layer.name]
        for variant in generator.sample(list(layer.variants), len(layer.variants)):
            if variant.score < here.score:
                now.put(layer.name, variant)
                if now.holds():
                    break
                now.put(layer.name, here)


def _report(problem: Problem, choices: list[dict[str, str]], started: float, rule: str) -> Solution:
    feasible = [c for c in choices if not problem.violated(c)]
    if not feasible:
        return no_solution("infeasible", -math.inf, time.monotonic() - started, rule)
    best = min(feasible, key=lambda c: problem.totals(c)["score"])
    return certified(problem, best, proven=False, seconds=time.monotonic() - started, solver=rule)
