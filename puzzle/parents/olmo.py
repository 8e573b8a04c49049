"""OLMo-2: norms after the sub-blocks alone, and one over all heads of q and of k. OLMo-3: windows too, with a RoPE of their own."""

from __future__ import annotations

from puzzle.parents.family import Config, attention, decoder, family, ffn, windows
from puzzle.parents.structure import Structure


@family("olmo2")
def olmo2(c: Config) -> Structure:
    layer = {"attention": attention(c, norm="after", qk_norm="all"), "ffn": ffn(c, norm="after")}
    return decoder(c, [layer] * c["num_hidden_layers"])


@family("olmo3")
def olmo3(c: Config) -> Structure:
    gated = ffn(c, norm="after")
    layers = [
        {"attention": attention(c, window=w, rope=kind, norm="after", qk_norm="all"), "ffn": gated}
        for w, kind in zip(windows(c), c["layer_types"], strict=True)
    ]
    return decoder(c, layers)
