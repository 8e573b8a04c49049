"""Find every choice whose bound is below a threshold: partial choices grow layer by layer, hopeless ones are dropped.

    labels = {the empty choice}                                 # score 0, rows 0
    for layer i in order:
        for every label and every cell v of layer i:
            grow: score += score[i, v], rows += rows[:, i, v], and what the neighbours' arc and pairs that end here add
            drop it unless  score + λ·rows + to_go[i, v] - λ·b < threshold      for every vector λ of prices
            drop it unless  rows[k] + rest[i, k] <= b[k]                        for every row k
        thin: drop a label if another one with the same future has a score and rows[k], every k, that are no larger
        more than `keep` are left: give up, or with `beam` go on with those of the least bound
    return the labels by rising score, each traced back to its cells

Bound. For prices λ >= 0 a choice x within the limits scores s(x) >= s(x) + λ·(C x - b), the cost that `relax` makes a
path of: score + λ·rows is what the label's own part of the path costs, to_go the least that the later layers can (a
pair of layers apart is held open as in `relax`, min(0, w) / 2 at either end, until its second end says whether w
counts). Lagrangian costs to go in label setting: Dumitrescu and Boland 2003. rest[i, k] is the least that the layers
after i add to row k.

Dominance (label setting as for shortest paths with resource limits: Irnich and Desaulniers 2005). Labels have the same
future when they end in the same cell, or anywhere in the same layer where no arcs join neighbours: whatever completes
the one completes the other, at the same addition to score and rows. Every limit is a row `rows <= b`, a least amount
with its sign turned, so the dominating label's completion holds where the other's does, and scores no more. With pairs
of layers apart futures differ, and nothing is thinned. Compared are labels up to WINDOW places apart, sorted by end and
first row: what this misses costs time alone.

Exact. Let x meet every row and score below the threshold. Both tests bound from below what any completion of a prefix
comes to, and x completes its own prefixes, so none of them is dropped but for a dominating one, whose completion is no
worse: without `thin` every such x is found, with it one that scores no more than any of them. `complete` says that
`keep` cut nothing off. Sums here are floating point, and the row test and `solve`'s threshold have slack, so that too
much is kept: `solve` verifies in exact arithmetic, and searches again without `thin` where the best found breaks a
limit by rounding, or one that is no row (stages).

Cost. A layer with N labels, V cells, K rows and M price vectors takes O(N V K M) time and O(N V (K + M)) memory,
thinning n survivors O(n (log n + WINDOW K)) a pass. N is at most `keep`, and the number of choices below the threshold
in the worst case; with the bounds of `relax` tens are left where there are 54 to the power of 126 choices.

Two layers of 2 seconds within 3, either of which may be halved, for a score of 1 or of 2:

    >>> from puzzle.solver import Constraint, Layer, Problem, Variant
    >>> from puzzle.solver.arrays import compile_problem
    >>> from puzzle.solver.relax import best_prices, bound_at
    >>> full = Variant(name="full", score=0.0, resources={"seconds": 2.0})
    >>> layers = tuple(
    ...     Layer(name=name, variants=(full, Variant(name="half", score=score, resources={"seconds": 1.0})))
    ...     for name, score in (("L0", 1.0), ("L1", 2.0))
    ... )
    >>> arrays = compile_problem(Problem(layers=layers, constraints=(Constraint(resource="seconds", max=3.0),)))
    >>> bounds = [bound_at(arrays, prices)[0] for prices in best_prices(arrays)]
    >>> found = search(arrays, bounds, 2.5 * arrays.factor, arrays.allowed)       # all that score less than 2.5
    >>> [arrays.true_score(score) for score in found.score.tolist()]
    [1.0, 2.0]
    >>> [arrays.choice(picked) for picked in found.picked]
    [{'L0': 'half', 'L1': 'full'}, {'L0': 'full', 'L1': 'half'}]
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from puzzle.solver.arrays import Arrays
from puzzle.solver.relax import Bound

MAX_LABELS = 300_000
WINDOW = 30  # labels that each is compared with
CROWD = 500  # fewer labels are not worth comparing
FEASIBLE = 1e-9  # slack on scaled rows in floating point; exact arithmetic has the last word


@dataclass(frozen=True, slots=True)
class Found:
    """picked [N, L] cells, by rising score [N] (scaled). complete: nothing below the threshold was dropped for space.
    thinned: some were dropped for others that are no worse, up to rounding."""

    picked: np.ndarray
    score: np.ndarray
    complete: bool
    thinned: bool = False


def search(
    arrays: Arrays,
    bounds: list[Bound],
    threshold: float,
    cells: np.ndarray,
    *,
    keep: int = MAX_LABELS,
    beam: bool = False,
    thin: bool = True,
    deadline: float | None = None,
) -> Found:
    """All choices over `cells` [L, V] with every bound below `threshold`; with `thin` all that may be the best.

    keep: labels held at once; beyond it the search stops (complete is False), or with `beam` goes on with the best ones.
    """
    num_layers, num_rows = arrays.score.shape[0], arrays.num_rows
    order = _order(arrays, cells)
    prices = np.stack([b.prices for b in bounds])  # [M, K]
    constant = np.array([b.constant for b in bounds])[:, None]
    to_go = _to_go(arrays, bounds, cells, order)  # [M, L, V], by layer
    rest = _least_rows(arrays, cells, order)  # [L, K], by position: the least that later layers use
    far, room = _Far(arrays, bounds, order), arrays.b + FEASIBLE * (1 + np.abs(arrays.b))

    score, rows, node = np.zeros(1), np.zeros((num_rows, 1)), np.zeros(1, dtype=int)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    complete, thinned = True, False
    thin = thin and not len(arrays.far.score)  # what far pairs hold open differs from label to label
    for position, i in enumerate(order):
        options = np.flatnonzero(cells[i])
        grown = score[:, None] + arrays.score[i, options][None, :]
        used = rows[:, :, None] + arrays.rows[:, i, options][:, None, :]
        if arrays.arc_score is not None and position > 0:
            assert arrays.arc_rows is not None
            grown = grown + arrays.arc_score[i - 1][node][:, options]
            used = used + arrays.arc_rows[:, i - 1][:, node][:, :, options]
        grown, used = far.close(i, options, grown, used)
        cost = grown[None] + np.tensordot(prices, used, 1) + (to_go[:, i, options] + constant)[:, None, :] + far.opened
        worst = cost.max(axis=0)
        fits = worst < threshold
        for use, most in zip(used, room - rest[position], strict=True):
            fits &= use <= most
        parent, picked = np.nonzero(fits)
        if thin and len(parent) > CROWD:
            ends = picked if arrays.arc_score is not None else np.zeros_like(picked)
            left = _undominated(ends, grown[parent, picked], used[:, parent, picked])
            thinned = thinned or len(left) < len(parent)
            parent, picked = parent[left], picked[left]
        if len(parent) > keep:
            complete = False
            if not beam:
                return Found(np.zeros((0, num_layers), dtype=int), np.zeros(0), False)
            best = np.argpartition(worst[parent, picked], keep)[:keep]
            parent, picked = parent[best], picked[best]
        score, rows, node = grown[parent, picked], used[:, parent, picked], options[picked]
        far.grow(i, parent, node)
        trail.append((parent, node))
        if len(parent) == 0 or (deadline is not None and time.monotonic() > deadline):
            return Found(np.zeros((0, num_layers), dtype=int), np.zeros(0), complete and len(parent) == 0)
    at = np.argsort(score, kind="stable")
    score = score[at]
    chosen = np.empty((len(at), num_layers), dtype=int)
    for position in range(num_layers - 1, -1, -1):
        parent, node = trail[position]
        chosen[:, order[position]] = node[at]
        at = parent[at]
    return Found(chosen, score, complete, thinned)


def _undominated(ends: np.ndarray, score: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Indices of the labels that no near one makes superfluous. Sorted by end and first row, the others need comparing."""
    values = np.vstack([score[None], rows[1:]])
    at = np.lexsort((rows[0], ends)) if len(rows) else np.lexsort((score, ends))
    while True:
        sorted_values, sorted_ends = values[:, at], ends[at]
        dead = np.zeros(len(at), dtype=bool)
        for step in range(1, min(WINDOW, len(at) - 1) + 1):
            no_worse = sorted_ends[:-step] == sorted_ends[step:]
            for row in sorted_values:  # several times faster than `all` over the short axis
                no_worse &= row[:-step] <= row[step:]
            dead[step:] |= no_worse
        at = at[~dead]
        if dead.sum() <= 0.05 * len(dead):
            return np.sort(at)


def _order(arrays: Arrays, cells: np.ndarray) -> list[int]:
    """Neighbours' pairs fix the order; otherwise decided layers come first, then those whose cells differ most."""
    if arrays.arc_score is not None:
        return list(range(len(cells)))
    spread = np.where(cells, arrays.rows, -np.inf).max(axis=2) - np.where(cells, arrays.rows, np.inf).min(axis=2)
    difference = spread.max(axis=0) if arrays.num_rows else np.zeros(len(cells))
    free = cells.sum(axis=1) > 1
    return sorted(range(len(cells)), key=lambda i: (free[i], -difference[i]))


def _to_go(arrays: Arrays, bounds: list[Bound], cells: np.ndarray, order: list[int]) -> np.ndarray:
    if arrays.arc_score is not None:
        return np.stack([b.to_go for b in bounds])
    least = np.stack([np.where(cells, b.unit, np.inf).min(axis=1) for b in bounds])  # [M, L]
    after = np.zeros((*least.shape, 1))
    running = np.zeros(len(bounds))
    for i in reversed(order):
        after[:, i, 0] = running
        running = running + least[:, i]
    return np.broadcast_to(after, (*least.shape, cells.shape[1]))


def _least_rows(arrays: Arrays, cells: np.ndarray, order: list[int]) -> np.ndarray:
    least = np.where(cells, arrays.rows, np.inf).min(axis=2)  # [K, L]
    after = np.zeros((len(order), arrays.num_rows))
    position_of = {layer: p for p, layer in enumerate(order)}
    for position in range(len(order) - 2, -1, -1):
        after[position] = after[position + 1] + least[:, order[position + 1]]
        if arrays.arc_rows is not None:
            after[position] += arrays.arc_rows[:, order[position]].min(axis=(1, 2))
    for p, (i, j) in enumerate(zip(arrays.far.i, arrays.far.j, strict=True)):
        last = max(position_of[int(i)], position_of[int(j)])
        after[:last] += np.minimum(arrays.far.rows[:, p], 0.0)
    return after


class _Far:
    """Pairs of layers apart: which labels chose the first end, and what the bound still holds open for them."""

    def __init__(self, arrays: Arrays, bounds: list[Bound], order: list[int]):
        far = arrays.far
        self.half = np.stack([b.half for b in bounds])  # [M, P]
        position = {layer: p for p, layer in enumerate(order)}
        self.by_first: dict[int, list[tuple[int, int]]] = {}  # layer: (pair, cell of the first end)
        self.by_last: dict[int, list[tuple[int, int]]] = {}
        for p in range(len(far.score)):
            ends = [(int(far.i[p]), int(far.v[p])), (int(far.j[p]), int(far.w[p]))]
            (first, v), (last, w) = sorted(ends, key=lambda end: position[end[0]])
            self.by_first.setdefault(first, []).append((p, v))
            self.by_last.setdefault(last, []).append((p, w))
        self.pairs = far
        self.chosen: dict[int, np.ndarray] = {}  # open pair: the labels [N] that chose its first end
        self.opened = np.zeros((len(bounds), 1, 1))  # [M, N, 1 or options]
        self.sum = np.zeros((len(bounds), 1))

    def close(self, i: int, options: np.ndarray, grown: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs whose last end is in layer i add what they truly add; pairs that begin here open."""
        for p, w in self.by_last.get(i, ()):
            chose = self.chosen.pop(p)
            self.sum = self.sum - self.half[:, p : p + 1] * chose
            at = np.flatnonzero(options == w)
            if at.size:
                grown[:, at[0]] += self.pairs.score[p] * chose
                used[:, :, at[0]] += self.pairs.rows[:, p : p + 1] * chose
        self.opened = np.repeat(self.sum[:, :, None], len(options), axis=2) if self.by_first else self.sum[:, :, None]
        for p, v in self.by_first.get(i, ()):
            self.opened[:, :, options == v] += self.half[:, p][:, None, None]
        return grown, used

    def grow(self, i: int, parent: np.ndarray, node: np.ndarray) -> None:
        """Follow the labels that survived layer i."""
        if not self.by_first:
            return
        self.sum = self.sum[:, parent]
        self.chosen = {p: chose[parent] for p, chose in self.chosen.items()}
        for p, v in self.by_first.get(i, ()):
            self.chosen[p] = (node == v).astype(float)
            self.sum = self.sum + self.half[:, p : p + 1] * self.chosen[p]
