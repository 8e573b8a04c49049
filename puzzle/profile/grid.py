"""What a profile measures: parts of a parent and its alternatives, and the points of each. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.blocklib.variant import default_names, variant_of
from puzzle.parents.structure import Structure
from puzzle.profile.parts import WHOLE, Ends, Part, ends_of, priced_as

MAX_WIDE_BYTES = 12 * 2**30  # of one FFN in bf16: wider ones are not measured
OFFERED = ("kv4", "kv2", "kv1", "window-128", "window-1024")  # where no library says: beside the default ones


class At(NamedTuple):
    """One point of a part: one prefill of `context` tokens, or one decode step after `context` cached ones, of `batch` sequences."""

    phase: str
    batch: int
    context: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """batches: in decode. contexts: cached tokens before a decode step. prompts: (batch, length) in prefill. rows: of what depends on
    a number of rows alone, in prefill. by_rows: whether such parts are measured by rows, once for all batches and contexts.
    wide: FFN widths as multiples of the parent's, what fusion makes. seconds, min_samples: spent on a point in each of `rounds`
    walks over all points, so that a slow minute does not sit on one part; a steady machine is spared the later ones."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = ()
    by_rows: bool = False
    whole: bool = False  # whether the whole parent is measured too
    wide: tuple[int, ...] = ()
    seconds: float
    min_samples: int
    rounds: int = 1

    @property
    def capacity(self) -> int:
        """Tokens that a cache is made for where all points share one: the longest context and one more."""
        return max([*self.contexts, *(length for _, length in self.prompts)]) + 1


def cpu_grid(
    batches: Sequence[int] = (1, 4, 16, 64),
    prefill: Sequence[int] = (64, 128, 256),
    contexts: Sequence[int] = (64, 128, 256, 512),
    seconds: float = 0.2,
    rounds: int = 2,
) -> Grid:
    """Every part at every batch and context, in turns, and the whole parent beside them."""
    return Grid(
        batches=tuple(batches),
        contexts=tuple(contexts),
        prompts=tuple((b, t) for b in batches for t in prefill),
        whole=True,
        seconds=seconds,
        min_samples=4,
        rounds=rounds,
    )


def gpu_grid(
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    prefill: Sequence[int] = (128, 512, 2048, 8192, 32768),
    contexts: Sequence[int] = (128, 512, 2048, 4096, 8192, 32768, 131072),
    seconds: float = 0.025,
    rounds: int = 1,
) -> Grid:
    """Batch 1 to 512, contexts to 128k; prompts of at most 32,768 tokens together."""
    return Grid(
        batches=tuple(batches),
        contexts=tuple(contexts),
        prompts=tuple((b, t) for b in (1, 4, 16, 64, 256) for t in prefill if b * t <= 32768),
        rows=(128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        by_rows=True,
        wide=(2, 4, 8, 16),
        seconds=seconds,
        min_samples=5,
        rounds=rounds,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A part with its points. slot: where a sub-block stands; "" for others."""

    part: Part
    slot: str
    points: tuple[At, ...]

    @property
    def key(self) -> str:
        return priced_as(self.part)


def targets(structure: Structure, offered: Iterable[tuple[str, SubBlock]], grid: Grid) -> list[Target]:
    """All parts once. offered: (slot, sub-block) of all that a child may have."""
    found: dict[str, Target] = {}

    def add(part: Part, slot: str = "") -> None:
        if not isinstance(part, NoOp) and priced_as(part) not in found:
            found[priced_as(part)] = Target(part=part, slot=slot, points=_points(part, structure, grid))

    for part in (WHOLE, *ends_of(structure)) if grid.whole else ():
        add(part)
    for slot, sub_block in offered:
        add(sub_block.timed(), slot)
    for slot, sub_block in structure.usual.items():
        for times in grid.wide if isinstance(sub_block, SwiGLU) else ():
            wide = replace(sub_block, intermediate_size=times * sub_block.intermediate_size)
            if 2 * wide.num_matrix_parameters <= MAX_WIDE_BYTES:
                add(wide.timed(), slot)
    for end in ends_of(structure):
        add(end)
    return list(found.values())


def _points(part: Part, structure: Structure, grid: Grid) -> tuple[At, ...]:
    if grid.by_rows and isinstance(part, Ends):
        return tuple(At("decode", b, 0) for b in grid.batches)
    if grid.by_rows and isinstance(part, SubBlock) and part.by_rows:
        decode = [At("decode", b, 0) for b in grid.batches]
        return (*decode, *(At("prefill", 1, rows) for rows in grid.rows))
    longest = structure.max_length
    contexts = sorted({min(c, longest) for c in grid.contexts})
    decode = [At("decode", b, c) for c in contexts for b in grid.batches]
    return (*decode, *(At("prefill", b, t) for b, t in grid.prompts if t <= longest))


def offered_by(structure: Structure) -> list[tuple[str, SubBlock]]:
    """(slot, sub-block) of a parent's own and of what may stand in for them: all defaults, and OFFERED where they fit."""
    found: dict[tuple[str, SubBlock], None] = {}
    for slot, own in dict.fromkeys((slot, sub_block) for _, slot, sub_block in structure):
        found[slot, own] = None
        for name in (*default_names(own), *OFFERED):
            try:
                found[slot, variant_of(own, name, slot).sub_block] = None
            except UserError:
                continue  # the name does not fit this sub-block
    return list(found)
