"""Shapes of well-known parents, to profile and to bench without their weights. Sources: their config.json on the hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from puzzle.base.errors import UserError, nearest
from puzzle.blocklib.layer import LayerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """A parent's shapes: one layer's, how many there are, and what stands around them."""

    spec: LayerSpec
    num_layers: int
    vocab_size: int
    tied: bool = False
    max_length: int = 131072


def _spec(hidden: int, heads: int, kv: int, dim: int, width: int, qk_norm: bool = False) -> LayerSpec:
    return LayerSpec(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=dim,
        intermediate_size=width,
        rms_norm_eps=1e-5,
        inv_freq=tuple(500000.0 ** (-2 * i / dim) for i in range(dim // 2)),
        qk_norm=qk_norm,
    )


_LARGE = _spec(16384, 128, 8, 128, 53248)
SHAPES = {
    "llama-3.1-8b": Shapes(spec=_spec(4096, 32, 8, 128, 14336), num_layers=32, vocab_size=128256),
    "llama-3.3-70b": Shapes(spec=_spec(8192, 64, 8, 128, 28672), num_layers=80, vocab_size=128256),
    "llama-3.1-405b": Shapes(spec=_LARGE, num_layers=126, vocab_size=128256),
    # one GPU's share of eight: query heads, KV heads, FFN channels and vocabulary divided, hidden size whole
    "llama-3.1-405b-tp8": Shapes(
        spec=replace(_LARGE, num_attention_heads=16, num_key_value_heads=1, intermediate_size=6656),
        num_layers=126,
        vocab_size=16032,
    ),
    "qwen3-8b": Shapes(
        spec=_spec(4096, 32, 8, 128, 12288, qk_norm=True), num_layers=36, vocab_size=151936, max_length=40960
    ),
    "reference": Shapes(spec=_spec(256, 8, 4, 32, 704), num_layers=16, vocab_size=4096, tied=True, max_length=1024),
}


def named_shapes(name: str) -> Shapes:
    """Raises UserError for a name that is not listed."""
    if name not in SHAPES:
        raise UserError(f"--shapes {name} is unknown: {nearest(name, sorted(SHAPES))}")
    return SHAPES[name]


def shapes_of_facts(model: dict[str, Any]) -> Shapes:
    """The shapes of a library's parent, from library.json's "model". RoPE's frequencies are usual ones: no time depends on them."""
    spec = model["spec"]
    dim = spec["head_dim"]
    inv_freq = tuple(500000.0 ** (-2 * i / dim) for i in range(dim // 2))
    return Shapes(
        spec=LayerSpec(**spec, inv_freq=inv_freq),
        num_layers=model["num_layers"],
        vocab_size=model["vocab_size"],
        tied=model["tied"],
        max_length=model["max_length"],
    )
