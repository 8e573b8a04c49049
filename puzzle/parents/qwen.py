"""Qwen2 (biases on q, k, v) and Qwen3 (a norm on each head of q and k); both may have windows in some layers."""

from __future__ import annotations

from puzzle.parents.family import Config, attention, decoder, family, ffn, windows
from puzzle.parents.structure import Structure


@family("qwen2")
def qwen2(c: Config) -> Structure:
    biases = {"qkv_bias": True, "o_bias": False}
    return decoder(c, [{"attention": attention(c, window=w, **biases), "ffn": ffn(c)} for w in windows(c)])


@family("qwen3")
def qwen3(c: Config) -> Structure:
    return decoder(c, [{"attention": attention(c, window=w, qk_norm="head"), "ffn": ffn(c)} for w in windows(c)])
