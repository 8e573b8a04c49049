"""A choice that changes layer by layer, and whether it keeps a problem's limits: each change costs what it changes alone."""

from __future__ import annotations

from fractions import Fraction
from math import lcm

from puzzle.solver.problem import Problem, Variant, exact


class Running:
    """Exact totals of what is limited, as whole multiples of a unit of each resource. Stages, and totals that pairs change, are asked of the
    problem."""

    def __init__(self, problem: Problem):
        self.problem, self.picked = problem, dict[str, Variant]()
        limited = list(dict.fromkeys(c.resource for c in problem.constraints))
        found = {
            (layer.name, v.name): [exact(v.resources[r]) for r in limited]
            for layer in problem.layers
            for v in layer.variants
        }
        units = [lcm(*(amounts[n].denominator for amounts in found.values())) for n in range(len(limited))]
        self._amounts = {
            cell: [int(value * unit) for value, unit in zip(amounts, units, strict=True)]
            for cell, amounts in found.items()
        }
        self._bounds: list[tuple[int, Fraction | None, Fraction | None]] = []  # (number of the resource, least, most)
        for c in problem.constraints:
            n, fixed = limited.index(c.resource), exact(problem.fixed.get(c.resource, 0))
            least, most = (None if end is None else (exact(end) - fixed) * units[n] for end in (c.min, c.max))
            self._bounds.append((n, least, most))
        self._totals = [0] * len(limited)

    def begin(self, picked: dict[str, Variant]) -> None:
        """With a choice for every layer."""
        self.picked = picked
        self._totals = [
            sum(amounts) for amounts in zip(*(self._amounts[n, v.name] for n, v in picked.items()), strict=True)
        ]

    def put(self, layer: str, variant: Variant) -> None:
        old, new = self._amounts[layer, self.picked[layer].name], self._amounts[layer, variant.name]
        self._totals = [total - a + b for total, a, b in zip(self._totals, old, new, strict=True)]
        self.picked[layer] = variant

    def names(self) -> dict[str, str]:
        return {layer: variant.name for layer, variant in self.picked.items()}

    def holds(self) -> bool:
        """Whether the choice violates nothing."""
        problem, names = self.problem, self.names()
        if not problem.pairs and not all(_within(self._totals[n], least, most) for n, least, most in self._bounds):
            return False
        if any(names[layer] not in allowed for layer, allowed in problem.pins.items()):
            return False
        if any(len({names[layer] for layer in group}) > 1 for group in problem.equal):
            return False
        if not all(_within(len(count.cells & names.items()), count.min, count.max) for count in problem.counts):
            return False
        return not (problem.pairs or problem.stages) or not problem.violated(names)

    def is_hopeless(self) -> bool:
        """Whether some limit on a resource is out of reach of every choice."""
        if self.problem.pairs:
            return False
        for n, least, most in self._bounds:
            each = [[self._amounts[layer.name, v.name][n] for v in layer.variants] for layer in self.problem.layers]
            low, high = sum(map(min, each)), sum(map(max, each))
            if (most is not None and low > most) or (least is not None and high < least):
                return True
        return False


def _within(total: int, least: Fraction | int | None, most: Fraction | int | None) -> bool:
    return (least is None or total >= least) and (most is None or total <= most)
