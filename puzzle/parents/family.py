"""A family of parents: how its config.json becomes a structure, and where its tensors stand. One file each in this folder.

A family is a function from the config's values, with transformers' defaults filled in, to a `Structure`:

    @family("llama")
    def llama(c: Config) -> Structure:
        return decoder(c, [{"attention": attention(c), "ffn": ffn(c)}] * c["num_hidden_layers"])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.names import Where, plain
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Layer, Structure

Config = Mapping[str, Any]
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' names: ours
EXPERTS = ACTIVATIONS | {"relu2": "relu2", "swiglu_oai": "swiglu_oai"}  # of our children; with relu2 there is no gate
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """structure: of a config. where: of one tensor (layer, slot, sub-block, name inside it); other_layouts: the same where checkpoints
    are stored otherwise. base: what the config's global values describe, where layers may differ from it; None: what most layers have.
    prefixes: of stored names, and what they are called here. needed: fields without which a config.json is not whole."""

    structure: Callable[[Config], Structure]
    where: Callable[[int, str, SubBlock, str], Where] = plain
    other_layouts: tuple[Callable[[int, str, SubBlock, str], Where], ...] = ()
    base: Callable[[Config], Layer] | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)
    needed: tuple[str, ...] = NEEDED


FAMILIES: dict[str, Family] = {}


def family(model_type: str, **details: Any) -> Callable[[Callable[[Config], Structure]], Callable[[Config], Structure]]:
    """Decorator: the family of checkpoints with this `model_type`. details: fields of `Family`."""

    def add(structure: Callable[[Config], Structure]) -> Callable[[Config], Structure]:
        FAMILIES[model_type] = Family(structure=structure, **details)
        return structure

    return add


def activation(name: str, known: Mapping[str, str] = ACTIVATIONS) -> str:
    """Ours for transformers' `hidden_act`. Raises UserError for one that no kind of sub-block has."""
    if name not in known:
        raise UserError(f"hidden_act '{name}' is not supported; gated FFNs are, with {' or '.join(ACTIVATIONS)}")
    return known[name]


def refuse(c: Config, **unsupported: str) -> None:
    """Raise UserError where one of the named fields is set. unsupported: {field: what it asks for}"""
    for name, what in unsupported.items():
        if c.get(name):
            raise UserError(f"{name} = {c[name]} in config.json asks for {what}, which is not supported")


def head_dim(c: Config) -> int:
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def attention(c: Config, **changes: Any) -> Gqa:
    """Attention as in Llama: biases on all four matrices or none. changes: fields of `Gqa` that the family has otherwise."""
    bias = bool(c.get("attention_bias", False))
    fields = {
        "hidden_size": c["hidden_size"],
        "num_attention_heads": c["num_attention_heads"],
        "num_key_value_heads": c.get("num_key_value_heads") or c["num_attention_heads"],
        "head_dim": head_dim(c),
        "norm_eps": float(c["rms_norm_eps"]),
        "qkv_bias": bias,
        "o_bias": bias,
    }
    return Gqa(**fields | changes)


def ffn(c: Config, **changes: Any) -> SwiGLU:
    """The gated FFN as in Llama."""
    fields = {
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"],
        "activation": activation(c.get("hidden_act", "silu")),
        "bias": bool(c.get("mlp_bias", False)),
        "norm_eps": float(c["rms_norm_eps"]),
    }
    return SwiGLU(**fields | changes)


def moe(c: Config, known: Mapping[str, str] = ACTIVATIONS, **changes: Any) -> Moe:
    """The mixture of experts as in Qwen-MoE, whose router is a softmax. known: its activations; others mean something else elsewhere."""
    fields = {
        "hidden_size": c["hidden_size"],
        "num_experts": c.get("num_experts") or c["num_local_experts"],
        "num_experts_per_tok": c["num_experts_per_tok"],
        "moe_intermediate_size": c["moe_intermediate_size"],
        "activation": activation(c.get("hidden_act", "silu"), known),
        "norm_topk_prob": bool(c["norm_topk_prob"]),
        "norm_eps": float(c["rms_norm_eps"]),
    }
    return Moe(**fields | changes)


def windows(c: Config) -> list[int | None]:
    """Of every layer, by `layer_types` ("full_attention" or "sliding_attention"). Raises UserError for another type."""
    found: list[int | None] = []
    for index, kind in enumerate(c["layer_types"]):
        if kind not in ("full_attention", "sliding_attention"):
            raise UserError(f"layer_types[{index}] = '{kind}' in config.json is not supported: full_attention and "
                            "sliding_attention are")  # fmt: skip
        found.append(c["sliding_window"] if kind == "sliding_attention" else None)
    return found


def ropes(c: Config) -> dict[str, Rope]:
    """One for all layers, called "default"; or one for each type of layer that `rope_parameters` (a child's `ropes`) names."""
    found = c.get("ropes") or c.get("rope_parameters") or {}
    nested = {name: value for name, value in found.items() if isinstance(value, Mapping)}
    size = {"head_dim": head_dim(c), "max_length": int(c["max_position_embeddings"])}
    return {name: Rope(parameters=value, **size) for name, value in (nested or {"default": found}).items()}


def decoder(c: Config, layers: Sequence[Layer], **changes: Any) -> Structure:
    """What stands around the layers as in Llama. changes: fields of `Structure` that the family has otherwise."""
    fields = {
        "hidden_size": c["hidden_size"],
        "vocab_size": c["vocab_size"],
        "max_length": int(c.get("max_position_embeddings", 2048)),
        "tied": bool(c.get("tie_word_embeddings", False)),
        "norm_eps": float(c["rms_norm_eps"]),
        "ropes": ropes(c),
    }
    return Structure(layers=tuple(layers), **fields | changes)
