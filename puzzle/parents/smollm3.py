"""SmolLM3: Llama with layers that have no positions, which may have a window."""

from __future__ import annotations

from puzzle.base.errors import UserError
from puzzle.parents.family import Config, attention, decoder, family, ffn, windows
from puzzle.parents.structure import Structure


@family("smollm3")
def smollm3(c: Config) -> Structure:
    reach = windows(c)
    if any(reach) and not c["use_sliding_window"]:
        raise UserError("layer_types in config.json has windows that use_sliding_window turns off: mend one of them")
    kinds = ["default" if turns else None for turns in c["no_rope_layers"][: c["num_hidden_layers"]]]
    return decoder(
        c,
        [{"attention": attention(c, window=w, rope=rope), "ffn": ffn(c)} for w, rope in zip(reach, kinds, strict=True)],
    )
