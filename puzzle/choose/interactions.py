"""Interactions between replacements, fitted from measured children by ridge regression. Needs no torch.

    KL(child) - Σ_i s_i  ≈  Σ_i ρ_i · 2 √(s_i,attention s_i,ffn) + Σ_i ρ_i,i+1 · 2 √(s_i s_{i+1}) + ρ · Σ_{far i < j} 2 √(s_i s_j)

s_i is the score of layer i's cell in the library; every equation is divided by Σ s, so that relative errors count, and weighs less the further Σ s
is from that of near-optimal children (the ratio of the smaller to the larger). Each ρ of its own kind
is drawn to their mean by a ridge, whose strength has the least error on children that are left out one by one (from the hat matrix).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from puzzle.blocklib.variant import PARENT
from puzzle.choose.cells import Cell
from puzzle.choose.context import Interactions
from puzzle.library.manifest import Library, Replacement, score_name

RIDGES = (1e9, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # of what differs between places of a kind
WEAK = 1e-4  # of the means
LEAST = 8  # children
PARTS = 6  # of children, measured for each layer
Layers = Mapping[int, Replacement]  # of a child: what is not the parent's


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """error, error_before: root of the mean squared relative error of children left out, and of the plain sum of scores."""

    interactions: Interactions
    num_children: int
    ridge: float
    error: float
    error_before: float


class Terms:
    """What a library's cells contribute to the fit. cells: per layer, by the solver's name."""

    def __init__(self, library: Library, cells: Sequence[Mapping[str, Cell]]):
        self.cells = [{frozenset(cell.variants.items()): cell for cell in layer.values()} for layer in cells]
        self.slots = [tuple(space) for space in library.spaces]
        scored = [library.scores(n) if n in library.layers else {} for n in range(library.num_layers)]
        self.roots = [{name: root(cell.score) for name, cell in layer.items()} for layer in cells]
        self.inner = [
            {name: _inner(cell, scores) for name, cell in layer.items()}
            for layer, scores in zip(cells, scored, strict=True)
        ]

    def chosen(self, child: Layers) -> list[Cell] | None:
        """A child's cells; None where one of them is no choice."""
        found = []
        for n, slots in enumerate(self.slots):
            own = {slot: child.get(n, {}).get(slot, PARENT) for slot in slots}
            if (cell := self.cells[n].get(frozenset(own.items()))) is None:
                return None
            found.append(cell)
        return found

    def of(self, chosen: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray, float]:
        """(2 Σ √(s t) within each layer [L], of neighbours [L-1], and of all pairs further apart)."""
        inner = np.array([self.inner[n][cell.name] for n, cell in enumerate(chosen)])
        roots = np.array([self.roots[n][cell.name] for n, cell in enumerate(chosen)])
        near = 2 * roots[:-1] * roots[1:]
        return inner, near, float(roots.sum() ** 2 - (roots**2).sum() - near.sum())


def fit_interactions(
    library: Library,
    cells: Sequence[Mapping[str, Cell]],
    children: Sequence[tuple[Layers, float]],
    near_best: Sequence[Layers],
) -> Fit | str:
    """children: measured ones, with their KL; near_best: those that say how much damage others do far away. Where they do not tell
    interactions, what is lacking."""
    terms, rows, targets, totals = Terms(library, cells), [], [], []
    count, best = library.num_layers, [chosen for one in near_best if (chosen := terms.chosen(one))]
    for layers, kl in children:
        chosen = terms.chosen(layers)
        total = sum(cell.score for cell in chosen or ())
        if chosen is None or total <= 0:
            continue
        inner, near, far = terms.of(chosen)
        rows.append(np.concatenate([[inner.sum(), near.sum(), far], inner, near]) / total)
        targets.append(kl / total - 1)
        totals.append(total)
    if len(rows) < LEAST:
        return (
            f"that takes {LEAST} measured children whose scores sum to more than 0; {len(rows)} of {len(children)} do"
        )
    typical, each = float(np.mean([sum(cell.score for cell in chosen) for chosen in best])), np.array(totals)
    if typical <= 0:
        return f"scores of near-optimal children sum to {typical:.2g} nats/token on average, which none can be part of"
    weights = np.minimum(typical / each, each / typical)
    design, target = np.array(rows) * np.sqrt(weights)[:, None], np.array(targets) * np.sqrt(weights)
    scale = math.sqrt(len(weights) / weights.sum())
    error, ridge, values = min((_ridged(design, target, ridge) for ridge in RIDGES), key=lambda found: found[0])
    own = values[3:]
    far_sums = np.mean([_far_sums(terms, chosen) for chosen in best], axis=0)
    interactions = Interactions(
        within=[float(values[0] + one) for one in own[:count]],
        adjacent=[float(values[1] + one) for one in own[count:]],
        far=float(values[2]),
        far_sums=[float(one) for one in far_sums],
        roots=terms.roots,
        inner=terms.inner,
    )
    error, before = error * scale, float(np.sqrt(np.mean(target**2))) * scale
    return Fit(interactions=interactions, num_children=len(rows), ridge=ridge, error=error, error_before=before)


def predicted(interactions: Interactions, terms: Terms, child: Layers) -> float:
    """Nats per token of a child, every pair of layers counted as it is."""
    chosen = terms.chosen(child)
    assert chosen is not None
    inner, near, far = terms.of(chosen)
    total = sum(cell.score for cell in chosen) + float(np.dot(interactions.within, inner))
    return total + float(np.dot(interactions.adjacent, near)) + interactions.far * far


def _ridged(design: np.ndarray, target: np.ndarray, ridge: float) -> tuple[float, float, np.ndarray]:
    """(root of the mean squared error of rows left out, ridge, coefficients)"""
    weights = np.diag([WEAK] * 3 + [ridge] * (design.shape[1] - 3))
    inverse = np.linalg.inv(design.T @ design + weights)
    values = inverse @ design.T @ target
    hat = np.einsum("ij,jk,ik->i", design, inverse, design)
    left_out = (target - design @ values) / np.maximum(1 - hat, 1e-6)
    return float(np.sqrt(np.mean(left_out**2))), ridge, values


def _far_sums(terms: Terms, chosen: Sequence[Cell]) -> np.ndarray:
    roots = np.array([terms.roots[n][cell.name] for n, cell in enumerate(chosen)])
    around = roots.copy()
    around[:-1] += roots[1:]
    around[1:] += roots[:-1]
    return roots.sum() - around


def _inner(cell: Cell, scores: Mapping[str, Mapping[str, float]]) -> float:
    """2 Σ √(s t) over the pairs of a cell's slots; 0 where their joint score was measured."""
    replaced = {slot: name for slot, name in cell.variants.items() if name != PARENT}
    if len(replaced) < 2 or score_name(replaced) in scores:
        return 0.0
    alone = [scores[score_name({slot: name})]["kl"] for slot, name in replaced.items()]
    return sum(map(root, alone)) ** 2 - sum(max(0.0, one) for one in alone)


def sample(children: Sequence[Layers]) -> list[dict[int, Replacement]]:
    """Parts of these children whose measurement tells interactions apart: single layers of several replacements, and pairs of
    neighbouring layers, each once; at most PARTS a layer on average, drawn with a fixed seed."""
    found: dict[str, dict[int, Replacement]] = {}
    for child in children:
        alone = [{n: one} for n, one in child.items() if len(one) > 1]
        both = [{a: child[a], b: child[b]} for a, b in pairwise(sorted(child)) if b == a + 1]
        for part in (*alone, *both):
            found.setdefault(str(part), part)
    every, most = list(found.values()), PARTS * max((len(child) for child in children), default=0)
    return every if len(every) <= most else random.Random(0).sample(every, most)


def root(score: float) -> float:
    """√score; 0 of what is below 0 by rounding."""
    return math.sqrt(max(0.0, score))
