"""config.json of a sliced parent, in its own family's words."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.parents.opened import OWN_CONFIGS, HfModel, defaults_of, structure_of
from puzzle.parents.structure import Structure

BY_LAYER = ("layer_types", "layers_block_type", "no_rope_layers", "hybrid_override_pattern")  # a value or a letter each


def check_sliceable(parent: HfModel) -> None:
    """Raise UserError for a checkpoint whose config cannot be written anew."""
    kind = parent.config["model_type"]
    if kind in OWN_CONFIGS:
        raise UserError(
            f"{parent.source} is a '{kind}' checkpoint, whose layers have sizes of their own: slice its parent, then build and solve"
        )
    if (kind := parent.checkpoint.quantised) is not None:
        raise UserError(f"{parent.source} is in {kind}: slice the checkpoint in bf16 that it was made from")


def sliced_config(parent: HfModel, structure: Structure, layers: list[int]) -> dict[str, Any]:
    """What says `structure`, the parent's with these of its layers. Raises UserError where the family has no words for it: what is
    written is read back first."""
    whole, config = parent.structure, dict(parent.config)
    config.pop("auto_map", None)  # code that is not copied, of families that transformers has
    usual = defaults_of(config, parent.directory)
    if structure.hidden_size != whole.hidden_size:
        config["hidden_size"] = structure.hidden_size
        if attends := [b for _, _, b in whole if isinstance(b, Gqa)]:
            config["head_dim"] = attends[0].head_dim  # which else may follow from the width
    if len(layers) < whole.num_layers:
        for name in BY_LAYER:
            if (value := config.get(name) or usual.get(name)) and len(value) == whole.num_layers:
                kept = [value[index] for index in layers]
                config[name] = "".join(kept) if isinstance(value, str) else kept
        if "num_hidden_layers" in config:
            config["num_hidden_layers"] = len(layers)
        if "mlp_only_layers" in usual:
            dense = [index for index, layer in enumerate(structure.layers) if not isinstance(layer.get("ffn"), Moe)]
            config |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    for _, _, sub_block in structure:
        if isinstance(sub_block, Mamba2):
            config |= {"mamba_num_heads": sub_block.num_heads, "mamba_head_dim": sub_block.head_dim}
            break
    try:
        said = structure_of(config, parent.directory)
    except UserError as error:
        raise UserError(_no_words(parent, structure, str(error).removesuffix(": mend it"))) from error
    if (what := _differs(replace(said, tied=structure.tied), structure)) is not None:
        raise UserError(_no_words(parent, structure, what))
    return config


def _no_words(parent: HfModel, structure: Structure, why: str) -> str:
    return (
        f"config.json of a '{parent.config['model_type']}' model has no words for {parent.source} with `hidden` {structure.hidden_size} "
        f"and `depth` {structure.num_layers}: {why}; give other sizes"
    )


def _differs(said: Structure, meant: Structure) -> str | None:
    """The first thing that a config says otherwise."""
    for index, (theirs, ours) in enumerate(zip(said.layers, meant.layers, strict=False)):
        for slot, sub_block in ours.items():
            if theirs.get(slot) != sub_block:
                found = theirs.get(slot)
                return f"layer {index} {slot} would be '{'nothing' if found is None else found.key()}', not '{sub_block.key()}'"
    for field in fields(Structure):
        theirs, ours = (getattr(one, field.name) for one in (said, meant))
        if field.name != "layers" and theirs != ours:
            return f"{field.name} would be {theirs}, not {ours}"
    return None if len(said.layers) == len(meant.layers) else f"it would have {len(said.layers)} layers"
