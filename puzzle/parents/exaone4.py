"""EXAONE-4: norms after the sub-blocks, a norm on each head of q and k; beside windows, full attention has no positions."""

from __future__ import annotations

from puzzle.parents.family import Config, attention, decoder, family, ffn, windows
from puzzle.parents.structure import Structure


@family("exaone4")
def exaone4(c: Config) -> Structure:
    hybrid = c["sliding_window"] is not None
    layers = [
        {
            "attention": attention(
                c, window=w, rope=None if hybrid and w is None else "default", norm="after", qk_norm="head"
            ),
            "ffn": ffn(c, norm="after"),
        }
        for w in windows(c)
    ]
    return decoder(c, layers)
