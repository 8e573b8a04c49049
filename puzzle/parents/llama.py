"""Llama; Mistral, which has one window for all layers; Seed-OSS, whose o has a bias of its own."""

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


@family("seed_oss")
def seed_oss(c: Config) -> Structure:
    layer = {"attention": attention(c, o_bias=bool(c["attention_out_bias"])), "ffn": ffn(c)}
    return decoder(c, [layer] * c["num_hidden_layers"])
