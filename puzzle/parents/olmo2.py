"""OLMo-2: norms after the sub-blocks alone, and one over all heads of q and of k."""

from __future__ import annotations

from puzzle.parents.family import Config, attention, decoder, family, ffn
from puzzle.parents.structure import Structure


@family("olmo2")
def olmo2(c: Config) -> Structure:
    layer = {"attention": attention(c, norm="after", qk_norm="all"), "ffn": ffn(c, norm="after")}
    return decoder(c, [layer] * c["num_hidden_layers"])
