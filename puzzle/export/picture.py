"""An architecture as text: a line per slot, a column per layer, a character per sub-block."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle.parents.structure import Layer

LEGEND = "█ parent   1 2 4 KV heads   m Mamba-2   g Gated DeltaNet   w window   ▁…▇ narrower   + wider   k lower top-k   d dense   / linear   r low rank   · none"


def picture(layers: Sequence[Layer], parents: Sequence[Layer]) -> list[str]:
    """layers: of the child; parents: for each of them, the layer of the parent that it is held against."""
    slots = list(dict.fromkeys(slot for layer in layers for slot in layer))
    width = max(map(len, slots), default=0) + 2
    lines = []
    for slot in slots:
        pairs = zip(layers, parents, strict=True)
        symbols = [
            layer[slot].symbol(parent[slot]) if slot in layer and slot in parent else " " for layer, parent in pairs
        ]
        lines.append(f"{slot:<{width}}" + " ".join(symbols))
    return [*lines, " " * width + LEGEND]
