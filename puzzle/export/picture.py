"""An architecture in two lines of text, a column per layer."""

from __future__ import annotations

from puzzle.library.manifest import PARENT, Library

SHADES = "▁▂▃▄▅▆▇█"


def picture(layers: list[dict[str, str]], library: Library) -> list[str]:
    """The architecture in two lines, a column per layer: KV heads or kind of attention, and the FFN's relative size."""
    symbols = {PARENT: "█", "none": "·", "linear": "/"}
    attention = [
        symbols.get(c["attention"], c["attention"][2:] if c["attention"].startswith("kv") else "w") for c in layers
    ]
    full = library.variant("ffn", PARENT)["num_parameters"]
    ffn = []
    for choice in layers:
        share = library.variant("ffn", choice["ffn"])["num_parameters"] / full
        ffn.append(symbols.get(choice["ffn"]) or SHADES[min(7, int(share * 8))])
    return [
        "attention  " + " ".join(attention),
        "ffn        " + " ".join(ffn),
        "           █ parent   1 2 4 KV heads   w window   ▁…▇ narrower   / linear   · none",
    ]
