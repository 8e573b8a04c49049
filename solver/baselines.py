"""Simple ways to choose, on the same problem and with the same report as the MIP, to see what exactness buys.

Greedy, uniform and random know limits on resources only: on a problem with pairs, counts or stages they may find nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace

from puzzle.solver.explain import scored_by
from puzzle.solver.problem import Constraint, Layer, Problem, Variant
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
    generator = random.Random(seed)
    found: list[Solution] = []
    for _ in range(50 * count):
        if len(found) == count:
            break
        started = time.monotonic()
        picked = {la.name: generator.choice(la.variants) for la in problem.layers}
        if not _repair(problem, picked, generator):
            continue
        _fill(problem, picked, generator)
        found.append(_report(problem, [{n: v.name for n, v in picked.items()}], started, "random"))
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


def _names(picked: dict[str, Variant]) -> dict[str, str]:
    return {layer: variant.name for layer, variant in picked.items()}


def _shuffled(layers: tuple[Layer, ...], generator: random.Random) -> list[Layer]:
    return generator.sample(list(layers), len(layers))


def _repair(problem: Problem, picked: dict[str, Variant], generator: random.Random) -> bool:
    limited = [c.resource for c in problem.constraints if c.max is not None]
    for _ in range(20):
        for layer in _shuffled(problem.layers, generator):
            if not problem.violated(_names(picked)):
                return True
            now = picked[layer.name]
            cheaper = [
                v for v in layer.variants if v != now and all(v.resources[r] <= now.resources[r] for r in limited)
            ]
            if cheaper:
                picked[layer.name] = generator.choice(cheaper)
    return not problem.violated(_names(picked))


def _fill(problem: Problem, picked: dict[str, Variant], generator: random.Random) -> None:
    for layer in _shuffled(problem.layers, generator):
        now = picked[layer.name]
        for variant in generator.sample(list(layer.variants), len(layer.variants)):
            if variant.score < now.score:
                picked[layer.name] = variant
                if not problem.violated(_names(picked)):
                    break
                picked[layer.name] = now


def _report(problem: Problem, choices: list[dict[str, str]], started: float, rule: str) -> Solution:
    feasible = [c for c in choices if not problem.violated(c)]
    if not feasible:
        return no_solution("infeasible", -math.inf, time.monotonic() - started, rule)
    best = min(feasible, key=lambda c: problem.totals(c)["score"])
    return certified(problem, best, proven=False, seconds=time.monotonic() - started, solver=rule)
