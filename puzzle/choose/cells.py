"""What each layer of a library may choose: a variant in every slot together, with its score. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from puzzle.base.errors import UserError
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.blocklib.variant import PARENT
from puzzle.library.manifest import Library, score_name
from puzzle.measure.architecture import Choice


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """variants, sub_blocks: by slot. score: nats per token. fused: its FFN is to be one with the next layer's."""

    variants: Mapping[str, str]
    sub_blocks: Mapping[str, SubBlock]
    score: float
    fused: bool = False

    @property
    def name(self) -> str:
        """What the solver calls it; nobody reads it back."""
        return "|".join(self.variants.values()) + ("+" if self.fused else "")

    @property
    def is_parent(self) -> bool:
        return all(name == PARENT for name in self.variants.values())

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
        return {
            slot: Choice(variant=name, sub_block=self.sub_blocks[slot], precision=precision)
            for slot, name in self.variants.items()
        }


def layer_cells(library: Library) -> list[list[Cell]]:
    """Per layer, every combination with its score: the joint one where it was measured, else the sum of its parts.

    Raises UserError for a variant that was not scored.
    """
    return [_cells(library, layer) for layer in range(library.num_layers)]


def _cells(library: Library, layer: int) -> list[Cell]:
    spaces = library.spaces[layer]
    scores = library.scores(layer) if layer in library.layers else {}

    def score(variants: Mapping[str, str]) -> float:
        replaced = {slot: name for slot, name in variants.items() if name != PARENT}
        joint = scores.get(score_name(replaced))
        if joint is not None:
            return joint["kl"]
        total = 0.0
        for slot, name in replaced.items():
            alone = score_name({slot: name})
            if alone not in scores:
                raise UserError(f"layer {layer} {alone} has no score: run `puzzle score {library.root}`")
            total += scores[alone]["kl"]
        return total

    found = []
    for names in product(*spaces.values()):
        variants = dict(zip(spaces, names, strict=True))
        sub_blocks = {slot: spaces[slot][name] for slot, name in variants.items()}
        found.append(Cell(variants=variants, sub_blocks=sub_blocks, score=score(variants)))
    return found
