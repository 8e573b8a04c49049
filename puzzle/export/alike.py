"""What the formats of stock families share, whose layers are alike (qwen3-moe, gpt-oss, granitemoehybrid): a config is made of what is usual,
read back by the family, and compared with the child.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.sub_block import SubBlock
from puzzle.export.child import Child
from puzzle.parents.family import Config
from puzzle.parents.structure import Structure

REST = "write `format` hf, in which layers may differ"


def words_around(child: Child, attends: Gqa) -> dict[str, Any]:
    """Fields of config.json that all of them have, and those of the parent that a child may keep. attends: the usual attention."""
    around = child.around
    return {
        **child.kept,
        "vocab_size": around.vocab_size,
        "hidden_size": around.hidden_size,
        "num_hidden_layers": len(child.layers),
        "num_attention_heads": attends.num_attention_heads,
        "num_key_value_heads": attends.num_key_value_heads,
        "attention_bias": attends.o_bias,
        "rms_norm_eps": around.norm_eps,
        "max_position_embeddings": around.max_length,
        "rope_parameters": dict(next(iter(around.ropes.values())).parameters),
        "tie_word_embeddings": around.tied,
        "dtype": child.dtype_name,
    }


def check_as_said(child: Child, read: Callable[[Config], Structure], config: Config, reader: str) -> None:
    """Raise UserError, naming the first layer that is not as the format's config says, and what of it; or what `read` does not take."""
    try:
        said = read(config)
    except UserError as error:
        raise UserError(f"{child.name}: {reader}: {error}: {REST}") from error
    for layer, found in zip(child.layers, said.layers, strict=True):
        for slot, sub_block in layer.slots.items():
            if slot not in found or sub_block != found[slot]:
                raise UserError(f"layer {layer.origin} {slot}: {reader} {_differs(sub_block, found.get(slot))}: {REST}")
    if said != child.structure.with_layers(said.layers):
        raise UserError(f"{child.name}: {reader} has no words for what stands around its layers: {REST}")


def usual(structure: Structure, kind: type[SubBlock]) -> Any:
    """What most layers that have this kind have; None where none has."""
    counted = Counter(sub_block for _, _, sub_block in structure if isinstance(sub_block, kind)).most_common(1)
    return counted[0][0] if counted else None


def usual_mixture(child: Child, reader: str) -> tuple[Gqa, Moe]:
    """What most layers have, of a format of mixtures. Raises UserError for a child without attention or without mixture."""
    attends, mixture = usual(child.structure, Gqa), usual(child.structure, Moe)
    if attends is None or mixture is None:
        what = "attention" if attends is None else "mixture of experts"
        raise UserError(f"{child.name} has no {what}, which {reader} needs: {REST}")
    return attends, mixture


def _differs(own: SubBlock, said: SubBlock | None) -> str:
    """In words, what of a sub-block the format does not say."""
    if said is None or type(own) is not type(said):
        return f"has no place for '{own.key()}'"
    names = [f.name for f in fields(own) if getattr(own, f.name) != getattr(said, f.name)]
    values = ", ".join(f"{name} {getattr(own, name)} beside {getattr(said, name)}" for name in names)
    return f"has one value for all layers, and this one has {values}"
