"""Gemma-3, text alone: GeGLU, norms before and after with 1 + weight, scaled embeddings, two RoPEs by type of layer."""

from __future__ import annotations

from puzzle.parents.family import Config, activation, attention, decoder, family, ffn, refuse, windows
from puzzle.parents.structure import Structure


@family("gemma3_text")
def gemma3_text(c: Config) -> Structure:
    refuse(
        c,
        final_logit_softcapping="tanh on the logits",
        attn_logit_softcapping="tanh on the scores",
        use_bidirectional_attention="attention to later tokens",
    )
    norms = {"norm": "both", "norm_offset": True}
    gated = ffn(c, activation=activation(c["hidden_activation"]), **norms)
    scale = float(c["query_pre_attn_scalar"]) ** -0.5
    layers = [
        {"attention": attention(c, window=w, rope=kind, qk_norm="head", scale=scale, **norms), "ffn": gated}
        for w, kind in zip(windows(c), c["layer_types"], strict=True)
    ]
    return decoder(c, layers, norm_offset=True, embedding_scale=c["hidden_size"] ** 0.5)
