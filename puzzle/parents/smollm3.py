"""SmolLM3: Llama with layers that have no positions, which may have a window."""

from __future__ import annotations

from puzzle.parents.family import Config, attention, decoder, family, ffn, windows
from puzzle.parents.structure import Structure


@family("smollm3")
def smollm3(c: Config) -> Structure:
    reach = windows(c) if c["use_sliding_window"] else [None] * c["num_hidden_layers"]
    kinds = ["default" if turns else None for turns in c["no_rope_layers"][: c["num_hidden_layers"]]]
    return decoder(
        c,
        [{"attention": attention(c, window=w, rope=rope), "ffn": ffn(c)} for w, rope in zip(reach, kinds, strict=True)],
    )
