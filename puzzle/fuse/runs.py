"""Which layers become one: runs read from the command line, checked, or chosen. Needs no torch.

A run (first, last) names layers first … last, both included. Layers are described by their `widths`: the FFN's channels
of a layer without attention, 0 where it has no FFN either, None for a layer that cannot be fused (any attention, or an FFN
that is one matrix: a SwiGLU without biases cannot be linear). A *stretch* is a longest row of layers that can be fused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise

from puzzle.base.errors import UserError

Run = tuple[int, int]
Widths = Sequence[int | None]
Matrix = Sequence[Sequence[float | None]]

EXAMPLE = "3-5,8-11"


def stretches(widths: Widths) -> list[Run]:
    """The longest rows of layers that can be fused, from their first FFN to their last; at least two FFNs each."""
    rows = (list(row) for _, row in groupby(range(len(widths)), key=lambda layer: widths[layer] is None))
    inside = [[layer for layer in row if widths[layer]] for row in rows]
    return [(row[0], row[-1]) for row in inside if len(row) > 1]


def members(run: Run, widths: Widths) -> list[int]:
    """The layers of a run that have an FFN."""
    return [layer for layer in range(run[0], run[1] + 1) if widths[layer]]


def width_of(run: Run, widths: Widths) -> int:
    """Channels of the fused FFN."""
    return sum(width or 0 for width in widths[run[0] : run[1] + 1])


def worst(run: Run, widths: Widths, dependency: Matrix | None) -> float | None:
    """The largest dependency of one FFN of the run on an earlier one; None where it was not measured."""
    if dependency is None:
        return None
    found = (dependency[i][j] for i, j in combinations(members(run, widths), 2))
    return max((value for value in found if value is not None), default=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """How runs are chosen. max_dependency: cosine distance, of any FFN of a run on any earlier one (below it, not at it).

    keep_last: the last FFN of each stretch, which the next attention reads, stays a layer of its own: it is the most
    sensitive one (arXiv 2503.18908, section 3). max_width: channels of a fused FFN; None: any number.
    """

    max_dependency: float = math.inf
    keep_last: bool = True
    max_width: int | None = None

    def __post_init__(self) -> None:
        if not self.max_dependency > 0:
            raise UserError(
                f"`max_dependency` {self.max_dependency:g}: a cosine distance above 0, such as 0.1 (2 allows any)"
            )
        if self.max_width is not None and self.max_width < 1:
            raise UserError(f"`max_width` {self.max_width}: channels of the fused FFN, 1 or more")


def choose_runs(widths: Widths, rule: Rule, dependency: Matrix | None = None) -> list[Run]:
    """Runs within the stretches, each as long as the rule allows, from left to right.

    Every part of an allowed run is allowed, so that taking the longest run from the left leaves the fewest layers.
    dependency [L][L]: M_ij at [i][j], j > i; None: not measured, which only `max_dependency` = ∞ allows.
    """
    found: list[Run] = []
    for stretch in stretches(widths):
        inside = members(stretch, widths)
        if rule.keep_last:
            inside.pop()
        at = 0
        while at < len(inside):
            end = at
            while end + 1 < len(inside) and _allowed(inside[at : end + 2], widths, rule, dependency):
                end += 1
            if end > at:
                found.append((inside[at], inside[end]))
            at = end + 1
    return found


def _allowed(layers: list[int], widths: Widths, rule: Rule, dependency: Matrix | None) -> bool:
    """Whether a run may take its last layer too; the rest of it is known to be allowed."""
    if rule.max_width is not None and sum(widths[layer] or 0 for layer in layers) > rule.max_width:
        return False
    if math.isinf(rule.max_dependency):
        return True
    assert dependency is not None, "a limit on dependency needs the matrix"
    values = [dependency[i][layers[-1]] for i in layers[:-1]]
    return all(value is not None and value < rule.max_dependency for value in values)


def parse_runs(text: str, num_layers: int) -> list[Run]:
    """'3-5,8-11' -> [(3, 5), (8, 11)]. Raises UserError for anything else, or layers that the child does not have."""
    found: list[Run] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
        if not match:
            raise UserError(f"`runs` {text}: '{part.strip()}' is no run; write first-last, such as {EXAMPLE}")
        first, last = int(match[1]), int(match[2])
        if last <= first:
            raise UserError(f"`runs` {text}: '{part.strip()}' holds no two layers; write first-last, such as {EXAMPLE}")
        if last >= num_layers:
            raise UserError(f"`runs` {text}: '{part.strip()}' is outside the child's layers 0-{num_layers - 1}")
        found.append((first, last))
    return found


def check_runs(runs: Sequence[Run], widths: Widths, what: Sequence[str]) -> list[Run]:
    """The runs in order. what: per layer, why it cannot be fused ("has attention"); read where its width is None.

    Raises UserError, naming run and layer, when runs overlap, or hold a layer that cannot be fused or fewer than two FFNs.
    """
    ordered = sorted(runs)
    for (first, last), (begin, end) in pairwise(ordered):
        if begin <= last:
            raise UserError(f"`runs`: {first}-{last} and {begin}-{end} overlap: a layer belongs to one run at most")
    able = ", ".join(f"{first}-{last}" for first, last in stretches(widths)) or "none"
    for first, last in ordered:
        for layer in range(first, last + 1):
            if widths[layer] is None:
                raise UserError(
                    f"`runs` {first}-{last}: layer {layer} {what[layer]}; rows of layers that can be fused: {able}"
                )
        if len(members((first, last), widths)) < 2:
            raise UserError(
                f"`runs` {first}-{last}: fewer than two of its layers have an FFN, so there is nothing to fuse; rows of "
                f"layers that can be fused: {able}"
            )
    return ordered
