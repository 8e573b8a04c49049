"""What each layer of a library may choose: a variant in every slot together, with its score. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.blocklib.variant import PARENT
from puzzle.choose.precision import Way
from puzzle.library.manifest import FP8_CACHE, FP8_WEIGHTS, Library, score_name, score_of
from puzzle.measure.architecture import Choice


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """variants, sub_blocks: by slot. score: nats per token. fused: its FFN is to be one with the next layer's. precisions: by slot,
    where they are chosen."""

    variants: Mapping[str, str]
    sub_blocks: Mapping[str, SubBlock]
    score: float
    fused: bool = False
    precisions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the solver calls it; nobody reads it back."""
        own = self.precisions
        words = (f"{name}:{own[slot]}" if slot in own else name for slot, name in self.variants.items())
        return "|".join(words) + ("+" if self.fused else "")

    @property
    def is_parent(self) -> bool:
        return all(name == PARENT for name in self.variants.values())

    @property
    def is_nothing(self) -> bool:
        """Whether the whole layer is left out."""
        return all(isinstance(sub_block, NoOp) for sub_block in self.sub_blocks.values())

    @property
    def attends(self) -> bool:
        """Whether it keeps something of every token."""
        return any(sub_block.state().per_token for sub_block in self.sub_blocks.values())

    @property
    def lone_ffn(self) -> SwiGLU | None:
        """Its gated FFN where that is all it has, so that it can be fused with a neighbour's; None for others."""
        rest = [b for b in self.sub_blocks.values() if not isinstance(b, NoOp)]
        return rest[0] if len(rest) == 1 and isinstance(rest[0], SwiGLU) else None

    def twin(self) -> Cell:
        """The same, fused with the next layer."""
        return replace(self, fused=True)

    def choices(self, precision: str) -> dict[str, Choice]:
        """precision: of what has none of its own."""
        return {
            slot: Choice(variant=name, sub_block=self.sub_blocks[slot], precision=self.precisions.get(slot, precision))
            for slot, name in self.variants.items()
        }


def layer_cells(library: Library, way: Way | None = None) -> list[list[Cell]]:
    """Per layer, every combination with its score: the joint one where it was measured, else the sum of its parts. What was screened
    out (`puzzle score --sub-block-screen`) has none and is no choice.

    way: where precision is chosen, every combination in every precision; its score has what fp8 costs the parent's own sub-blocks
    beside. Raises UserError for what was not scored.
    """
    cells = [_cells(library, layer) for layer in range(library.num_layers)]
    if way is None:
        return cells
    scores = cache(library.scores)  # a file, which only what fp8 costs is looked up in

    def charged(layer: int, slot: str, name: str) -> float:
        found = scores(layer).get(score_name({slot: name}))
        if found is None:
            told = score_name({slot: name})
            raise UserError(f"layer {layer} {told} has no score: run `puzzle score {library.root} --fp8`")
        return found["kl"]

    return [
        [other for cell in found for other in _in_precisions(partial(charged, n), cell, way)]
        for n, found in enumerate(cells)
    ]


def _in_precisions(charged: Callable[[str, str], float], cell: Cell, way: Way) -> list[Cell]:
    """charged: what fp8 costs the parent's own sub-block there, by slot and FP8_CACHE or FP8_WEIGHTS."""
    weighty = [slot for slot, sub_block in cell.sub_blocks.items() if not isinstance(sub_block, NoOp)]
    kept = [slot for slot in weighty if cell.sub_blocks[slot].state() and way.cache == "fp8"]
    score = cell.score + sum(charged(slot, FP8_CACHE) for slot in kept)
    found = []
    for names in product(way.tables, repeat=len(weighty)):
        chosen = dict(zip(weighty, names, strict=True))
        more = sum(charged(slot, FP8_WEIGHTS) for slot, name in chosen.items() if name == "fp8")
        precisions = dict.fromkeys(cell.variants, next(iter(way.tables))) | chosen
        found.append(replace(cell, score=score + more, precisions=precisions))
    return found


def _cells(library: Library, layer: int) -> list[Cell]:
    spaces = library.spaces[layer]
    scores = library.scores(layer) if layer in library.layers else {}

    def score(variants: Mapping[str, str]) -> float:
        try:
            return score_of(scores, variants)
        except KeyError as error:
            raise UserError(f"layer {layer} {error.args[0]} has no score: run `puzzle score {library.root}`") from error

    found, out = [], library.screened(layer)
    for names in product(*spaces.values()):
        variants = dict(zip(spaces, names, strict=True))
        if out and any(score_name({slot: name}) in out for slot, name in variants.items()):
            continue
        sub_blocks = {slot: spaces[slot][name] for slot, name in variants.items()}
        found.append(Cell(variants=variants, sub_blocks=sub_blocks, score=score(variants)))
    return found
