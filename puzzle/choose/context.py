"""Scores that see more than one replacement: marginal ones around a child, and interactions between replacements. Needs no torch.

The divergence of a child grows with the square of what its replacements change together, so that two of scores s and t cost
s + t + 2ρ √(s t), ρ the correlation of their changes. `Interactions` has ρ for the slots of a layer, for every pair of neighbouring
layers, and one for all layers further apart. The solver takes neighbours as pairs of cells; what is further apart as linear in √s,
around the sum of √s that near-optimal children have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from puzzle.choose.cells import Cell
from puzzle.library.manifest import Replacement
from puzzle.solver.problem import Count, Pair

Cells = Sequence[Sequence[Cell]]  # per layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """layers: the child's variants; marginal: per layer and slot, what each other variant in its place adds to the divergence. radius:
    layers that may change."""

    layers: Sequence[Replacement]
    marginal: Sequence[Mapping[str, Mapping[str, float]]]
    radius: int

    def scored(self, cells: Cells) -> list[list[Cell]]:
        """The cells with marginal scores, which add up over slots; without those that have none."""
        found = []
        for own, marginal, layer in zip(self.layers, self.marginal, cells, strict=True):
            kept = []
            for cell in layer:
                new = {slot: name for slot, name in cell.variants.items() if name != own[slot]}
                if all(name in marginal.get(slot, ()) for slot, name in new.items()):
                    kept.append(replace(cell, score=math.fsum(marginal[slot][name] for slot, name in new.items())))
            found.append(kept)
        return found

    def count(self, cells: Sequence[Mapping[str, Cell]], label: Callable[[int], str]) -> Count:
        """At most `radius` layers change."""
        kept = frozenset(
            (label(n), name)
            for n, (own, layer) in enumerate(zip(self.layers, cells, strict=True))
            for name, cell in layer.items()
            if dict(cell.variants) == dict(own)
        )
        return Count(name="radius", cells=kept, min=max(0, len(cells) - self.radius))


@dataclass(frozen=True, kw_only=True, slots=True)
class Interactions:
    """within, adjacent: ρ between the slots of every layer, and of every layer with the next; far: between others. far_sums: per layer,
    Σ √score of the layers apart from it in near-optimal children. roots, inner: per layer and cell, by the solver's name, √score, and
    2 Σ √(s t) of its slots."""

    within: Sequence[float]
    adjacent: Sequence[float]
    far: float
    far_sums: Sequence[float]
    roots: Sequence[Mapping[str, float]]
    inner: Sequence[Mapping[str, float]]

    def scored(self, cells: Cells) -> list[list[Cell]]:
        """The cells with what their slots, and the layers apart, add."""
        return [
            [
                replace(
                    cell,
                    score=cell.score
                    + self.within[n] * self.inner[n][cell.name]
                    + 2 * self.far * self.far_sums[n] * self.roots[n][cell.name],
                )
                for cell in layer
            ]
            for n, layer in enumerate(cells)
        ]

    def pairs(self, labels: Sequence[str]) -> tuple[Pair, ...]:
        """Of neighbouring layers. labels: what the solver calls them."""
        return tuple(
            Pair(a=(labels[n], a), b=(labels[n + 1], b), score=2 * correlation * x * y)
            for n, ((left, right), correlation) in enumerate(zip(pairwise(self.roots), self.adjacent, strict=True))
            if correlation
            for a, x in left.items()
            if x
            for b, y in right.items()
            if y
        )
