"""What a profile measures: parts of a parent and its alternatives, and the points of each. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from puzzle.base.errors import UserError
from puzzle.base.workload import PREFILL_ROWS
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.blocklib.variant import default_names, variant_of
from puzzle.parents.structure import Structure
from puzzle.profile.parts import Ends, Part, Whole, ends_of, priced_as

MAX_WIDE_BYTES = 12 * 2**30  # of one FFN in bf16: wider ones are not measured
# In bf16: as many layers as fit stand for the whole parent on a GPU.
WHOLE_WEIGHT_BYTES, WHOLE_CACHE_BYTES = (12 * 2**30, 32 * 2**30)
WHOLE_TOKENS = 1024  # of a sequence there: the measured length nearest to it
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
    whole: whether the parent is measured as a whole too, at all points, or where parts go by rows at one per number of rows.
    wide: FFN widths as multiples of the parent's, what fusion makes. seconds, min_samples: spent on a point in each of `rounds`
    walks over all points, so that a slow minute does not sit on one part; a steady machine is spared the later ones."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]
    rows: tuple[int, ...] = ()
    by_rows: bool = False
    whole: bool = False
    wide: tuple[int, ...] = ()
    seconds: float
    min_samples: int
    rounds: int = 1

    def __post_init__(self) -> None:
        """Every point once, in whatever order and how often it is asked for."""
        for name in ("batches", "contexts"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        object.__setattr__(self, "prompts", tuple(dict.fromkeys(self.prompts)))

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
    seconds: float = 0.015,
    rounds: int = 1,
) -> Grid:
    """Batch 1 to 512, contexts to 128k; as many prompts together as the runtime takes, and fewer."""
    prompts = [(b, t) for t in prefill for b in (1, 4, 16, 64, 256) if b * t < PREFILL_ROWS]
    return Grid(
        batches=tuple(batches),
        contexts=tuple(contexts),
        prompts=(*prompts, *((max(1, PREFILL_ROWS // t), t) for t in prefill)),
        rows=(128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        by_rows=True,
        whole=True,
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

    if grid.whole and not grid.by_rows:
        for part in (Whole(), *ends_of(structure)):
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
    if grid.whole and grid.by_rows:
        add(whole_of(structure, grid))
    return list(found.values())


def whole_of(structure: Structure, grid: Grid) -> Whole:
    """What stands for the whole on a GPU: all layers, or the first ones that fit beside the caches of the largest batch."""
    weights = cached = count = 0
    for layer in structure.layers:
        for sub_block in layer.values():
            weights += 2 * sub_block.num_parameters
            cached += max(grid.batches) * sub_block.state().num_bytes(_whole_context(grid, structure) + 1, "bf16")
        if count and (weights > WHOLE_WEIGHT_BYTES or cached > WHOLE_CACHE_BYTES):
            break
        count += 1
    return Whole(None if count == structure.num_layers else count)


def _whole_context(grid: Grid, structure: Structure) -> int:
    return min(structure.max_length, min(grid.contexts, key=lambda context: abs(context - WHOLE_TOKENS)))


def _points(part: Part, structure: Structure, grid: Grid) -> tuple[At, ...]:
    if grid.by_rows and isinstance(part, Ends):
        return tuple(At("decode", b, 0) for b in grid.batches)
    if grid.by_rows and isinstance(part, SubBlock) and part.by_rows:
        decode = [At("decode", b, 0) for b in grid.batches]
        return (*decode, *(At("prefill", 1, rows) for rows in grid.rows))
    longest = structure.max_length
    if grid.by_rows and isinstance(part, Whole):
        told = grid.batches if part.tells_of(structure.num_layers) else ()
        decode = [At("decode", b, _whole_context(grid, structure)) for b in told]
        prompts: dict[int, tuple[int, int]] = {}  # by their tokens together
        for b, t in sorted(grid.prompts, key=lambda prompt: -abs(prompt[1] - WHOLE_TOKENS)):
            if t <= longest:
                prompts[b * t] = b, t
        return (*decode, *(At("prefill", b, t) for b, t in sorted(set(prompts.values()))))
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
