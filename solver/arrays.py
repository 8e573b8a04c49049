"""The problem as arrays: groups of equal layers merged, pins applied, every limit a row `c·x <= b` of friendly size.

Letters: L layers (merged groups count once), V variants of the widest one, K rows, P pairs that join layers apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from puzzle.solver.problem import Cell, Problem, Variant


class Contradiction(Exception):
    """Pins and groups of equal layers leave some layer nothing to choose."""


@dataclass(slots=True)
class FarPairs:
    """Pairs of cells whose layers are not neighbours: (i, v) and (j, w) with i < j. score [P], rows [K, P]"""

    i: np.ndarray
    v: np.ndarray
    j: np.ndarray
    w: np.ndarray
    score: np.ndarray
    rows: np.ndarray


@dataclass(slots=True)
class Arrays:
    """score [L, V] and rows [K, L, V], both shifted so that each layer's least is 0 and scaled to about 1; b [K].

    allowed [L, V] says which cells exist. arc_score [L-1, V, V] and arc_rows [K, L-1, V, V] are what neighbours add, None
    without such pairs. The true score is shift + score / factor. row_names: the limit each row comes from.
    """

    layers: list[list[str]]
    variants: list[list[str]]
    allowed: np.ndarray
    score: np.ndarray
    rows: np.ndarray
    b: np.ndarray
    row_names: list[str]
    arc_score: np.ndarray | None
    arc_rows: np.ndarray | None
    far: FarPairs
    shift: float
    factor: float

    @property
    def num_rows(self) -> int:
        return len(self.b)

    def choice(self, picked: np.ndarray) -> dict[str, str]:
        """picked [L] cell indices -> {layer: variant} of the original problem."""
        return {name: self.variants[i][v] for i, v in enumerate(picked.tolist()) for name in self.layers[i]}

    def true_score(self, value: float) -> float:
        return self.shift + value / self.factor


def _merge(problem: Problem) -> list[list[int]]:
    """Layer indices that choose alike, in order of their first member; overlapping groups become one."""
    index = {layer.name: i for i, layer in enumerate(problem.layers)}
    root = list(range(len(problem.layers)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for group in problem.equal:
        for name in group[1:]:
            a, b = sorted((find(index[group[0]]), find(index[name])))
            root[b] = a
    members: dict[int, list[int]] = {}
    for i in range(len(problem.layers)):
        members.setdefault(find(i), []).append(i)
    return list(members.values())


def _common(problem: Problem, groups: list[list[int]]) -> list[list[str]]:
    """Of each group, the variants that all its layers have and no pin forbids. Raises Contradiction where none is left."""
    names: list[list[str]] = []
    for group in groups:
        common = [v.name for v in problem.layers[group[0]].variants]
        for i in group:
            layer = problem.layers[i]
            have = {v.name for v in layer.variants} & set(
                problem.pins.get(layer.name, [v.name for v in layer.variants])
            )
            common = [n for n in common if n in have]
        if not common:
            raise Contradiction(", ".join(problem.layers[i].name for i in group))
        names.append(common)
    return names


class _Places:
    """Where cells stand: `at` gives (group, place among its variants), None for a cell that cannot be chosen."""

    def __init__(self, problem: Problem, groups: list[list[int]], names: list[list[str]]):
        self.groups = {problem.layers[i].name: g for g, group in enumerate(groups) for i in group}
        self.variants = [{name: v for v, name in enumerate(common)} for common in names]

    def at(self, cell: Cell) -> tuple[int, int] | None:
        g = self.groups[cell[0]]
        v = self.variants[g].get(cell[1])
        return None if v is None else (g, v)


def _columns(problem: Problem, places: _Places, shape: tuple[int, int]) -> np.ndarray:
    """Of every cell its score, its resources by constraint, and how many of it each count has. [1 + constraints + counts, *shape]"""
    resources = [constraint.resource for constraint in problem.constraints]
    columns = np.zeros((1 + len(resources) + len(problem.counts), *shape))
    found: list[Variant] = []
    at: list[int] = []
    for layer in problem.layers:
        g = places.groups[layer.name]
        place = places.variants[g]
        own = [variant for variant in layer.variants if variant.name in place]
        found += own
        at += [g * shape[1] + place[variant.name] for variant in own]
    amounts = [[v.score for v in found], *([v.resources[resource] for v in found] for resource in resources)]
    for k, values in enumerate(amounts):  # summed in the order of layers
        columns[k] = np.bincount(at, values, columns[k].size).reshape(shape)
    for k, count in enumerate(problem.counts, len(amounts)):
        for cell in count.cells:
            if cell[0] in places.groups and (where := places.at(cell)) is not None:
                columns[k][where] += 1
    return columns


def compile_problem(problem: Problem) -> Arrays:
    """Raises Contradiction when a layer or a group of equal layers has no variant left."""
    groups = _merge(problem)
    names = _common(problem, groups)
    width = max(map(len, names))
    places = _Places(problem, groups, names)
    allowed = np.zeros((len(groups), width), dtype=bool)
    for g, common in enumerate(names):
        allowed[g, : len(common)] = True
    columns = _columns(problem, places, (len(groups), width))

    near: list[tuple[int, int, int, np.ndarray]] = []
    far: list[tuple[int, int, int, int, np.ndarray]] = []
    resources, zeros = [c.resource for c in problem.constraints], [0.0] * len(problem.counts)
    for pair in problem.pairs:
        a, b = places.at(pair.a), places.at(pair.b)
        if a is None or b is None:
            continue
        (i, v), (j, w) = sorted((a, b))
        values = np.array([pair.score, *(pair.resources.get(r, 0.0) for r in resources), *zeros])
        if i == j:
            if v == w:
                columns[:, i, v] += values
        elif j == i + 1:
            near.append((i, v, w, values))
        else:
            far.append((i, v, j, w, values))
    arcs = None
    if near:
        arcs = np.zeros((len(columns), len(groups) - 1, width, width))
        for i, v, w, values in near:
            arcs[:, i, v, w] += values
    far_values = np.array([f[4] for f in far]).T if far else np.zeros((len(columns), 0))
    i_far, v_far, j_far, w_far = np.array([f[:4] for f in far], dtype=int).reshape(-1, 4).T

    least = np.where(allowed, columns, np.inf).min(axis=2)
    columns = np.where(allowed, columns - least[:, :, None], 0.0)
    base = least.sum(axis=1)
    factor = _unit(columns[0], None if arcs is None else arcs[0], far_values[0])
    limits = [(c.label, problem.fixed.get(c.resource, 0.0), c.min, c.max) for c in problem.constraints]
    limits += [(c.label, 0.0, c.min, c.max) for c in problem.counts]
    picked, signs, ends, row_names = [], [], [], []
    for k, (label, fixed, low, high) in enumerate(limits, 1):
        scale = _unit(columns[k], None if arcs is None else arcs[k], far_values[k])
        for side, direction in ((high, scale), (low, -scale)):
            if side is not None:
                picked.append(k)
                signs.append(direction)
                ends.append(direction * (float(side) - fixed - base[k]))
                row_names.append(label)
    sign = np.array(signs)
    return Arrays(
        layers=[[problem.layers[i].name for i in group] for group in groups],
        variants=names,
        allowed=allowed,
        score=columns[0] * factor,
        rows=columns[picked] * sign[:, None, None],
        b=np.array(ends),
        row_names=row_names,
        arc_score=None if arcs is None else arcs[0] * factor,
        arc_rows=None if arcs is None else arcs[picked] * sign[:, None, None, None],
        far=FarPairs(i_far, v_far, j_far, w_far, far_values[0] * factor, far_values[picked] * sign[:, None]),
        shift=float(base[0]),
        factor=factor,
    )


def _unit(*parts: np.ndarray | None) -> float:
    """The factor that brings the largest magnitude to 1."""
    largest = max((float(np.abs(p).max()) for p in parts if p is not None and p.size), default=0.0)
    return 1.0 / largest if largest > 0 else 1.0
