"""A DeciLM checkpoint (model_type "nemotron-nas"), which `puzzle export` writes too, in the words of our own children.

`block_configs` says of every layer what `per_layer_config` says; weight names are the same. Layers may differ in KV heads,
FFN width, windows and in what they lack, so such a checkpoint opens as a child.
"""

from __future__ import annotations

from typing import Any

from puzzle.base.errors import UserError
from puzzle.parents.child import child, usual
from puzzle.parents.family import Config, family
from puzzle.parents.structure import Structure

WIDTH_STEP = 256  # readers round ffn_mult's width up to a multiple of it


@family("nemotron-nas", base=lambda c: usual(as_child(c)))
def nemotron_nas(c: Config) -> Structure:
    return child(as_child(c))


def as_child(config: Config) -> dict[str, Any]:
    """config.json of a nemotron-nas checkpoint as one of model_type "puzzle".

    Raises UserError for what our children have no words for, and for entries that are missing.
    """
    if config.get("linear_mlp", "linear_mlp") != "linear_mlp":
        raise UserError("it was written for mlx, which has its own names for linear FFNs: give the `format` hf export")
    try:
        heads, hidden, blocks = int(config["num_attention_heads"]), int(config["hidden_size"]), config["block_configs"]
        kinds = config.get("layer_types") or ["full_attention"] * len(blocks)
        layers = [_layer(block, heads, hidden) for block in blocks]
        for entry, kind in zip(layers, kinds, strict=True):
            if kind == "sliding_attention" and "num_key_value_heads" in entry:
                entry["sliding_window"] = int(config["sliding_window"])
        rope = rope_of(config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its config.json has a broken block_configs ({error!r}): export it again") from error
    shared = {key: value for key, value in config.items() if key not in ("block_configs", "layer_types", "auto_map")}
    return {
        **shared,
        "model_type": "puzzle",
        "num_key_value_heads": max((entry.get("num_key_value_heads", 1) for entry in layers), default=1),
        "intermediate_size": max((entry.get("intermediate_size", 1) for entry in layers), default=1),
        "sliding_window": None,
        "rope_parameters": rope,
        "per_layer_config": {str(index): entry for index, entry in enumerate(layers)},
    }


def rope_of(config: Config) -> dict[str, Any]:
    """rope_theta and rope_scaling as transformers' `rope_parameters`."""
    rope = dict(config.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _layer(block: dict[str, Any], heads: int, hidden: int) -> dict[str, Any]:
    """One entry of `block_configs` as one of `per_layer_config`."""
    attention, ffn = block["attention"], block["ffn"]
    entry: dict[str, Any] = {}
    kinds = ["skip" if p.get("no_op") else "linear" if p.get("replace_with_linear") else None for p in (attention, ffn)]
    for kind, owner in zip(kinds, ("attention", "mlp"), strict=True):
        if kind is not None:
            entry.setdefault(kind, []).append(owner)
    if kinds[0] is None:
        for key in ("window_length", "num_sink_tokens", "sparsify"):
            if attention.get(key):
                raise ValueError(f"{key} = {attention[key]} is not supported")
        entry["num_key_value_heads"] = heads // int(attention["n_heads_in_group"])
    if kinds[1] is None:
        given = ffn.get("intermediate_size")
        width = int(2 * ffn["ffn_mult"] * hidden / 3) if given is None else int(given)
        entry["intermediate_size"] = -(-width // WIDTH_STEP) * WIDTH_STEP if given is None else width
    return entry
