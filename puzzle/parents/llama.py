"""Llama, and Mistral, which has one window for all layers."""

from __future__ import annotations

from puzzle.parents.family import Config, attention, decoder, family, ffn
from puzzle.parents.structure import Structure


@family("llama")
def llama(c: Config) -> Structure:
    return decoder(c, [{"attention": attention(c), "ffn": ffn(c)}] * c["num_hidden_layers"])


@family("mistral")
def mistral(c: Config) -> Structure:
    layer = {"attention": attention(c, window=c.get("sliding_window")), "ffn": ffn(c)}
    return decoder(c, [layer] * c["num_hidden_layers"])
