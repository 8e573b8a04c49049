"""Granite-3: Llama with four multipliers, on the embedding, the scores, what each sub-block adds, and the logits."""

from __future__ import annotations

from puzzle.parents.family import Config, attention, decoder, family, ffn
from puzzle.parents.structure import Structure


@family("granite")
def granite(c: Config) -> Structure:
    residual = {"residual_scale": float(c["residual_multiplier"])}
    scores = {"scale": float(c["attention_multiplier"])}
    layer = {"attention": attention(c, **scores, **residual), "ffn": ffn(c, **residual)}
    return decoder(
        c,
        [layer] * c["num_hidden_layers"],
        embedding_scale=float(c["embedding_multiplier"]),
        logits_divisor=float(c["logits_scaling"]),
    )
