"""`--format qwen3-moe`: a child whose mixtures are alike as a plain Qwen3MoeForCausalLM, which stock engines read with their own code.

One number of experts, of a token's experts and of channels for all mixtures, one width for all dense FFNs, one kind of attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child
from puzzle.parents.child import hidden_act
from puzzle.parents.family import Config
from puzzle.parents.qwen3_moe import qwen3_moe
from puzzle.parents.structure import Structure

READER = "`format` qwen3-moe"
REST = "write `format` hf, in which layers may differ"


def qwen3_moe_config(child: Child) -> dict[str, Any]:
    """config.json. Raises UserError for what the format has no words for: the first layer, and what of it is not as in the others."""
    around, structure = child.around, child.structure
    attends, mixture, dense = (usual(structure, kind) for kind in (Gqa, Moe, SwiGLU))
    if attends is None or mixture is None:
        raise UserError(
            f"{child.name} has no {'attention' if attends is None else 'mixture of experts'}, which {READER} needs: {REST}"
        )
    if attends.window is not None:
        raise UserError(
            f"{child.name} has windows of {attends.window} tokens, which engines pass over in {READER}: {REST}"
        )
    only = [index for index, layer in enumerate(structure.layers) if isinstance(layer.get("ffn"), SwiGLU)]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **child.kept,
        "vocab_size": around.vocab_size,
        "hidden_size": around.hidden_size,
        "intermediate_size": mixture.active_width if dense is None else dense.intermediate_size,
        "num_hidden_layers": structure.num_layers,
        "num_attention_heads": attends.num_attention_heads,
        "num_key_value_heads": attends.num_key_value_heads,
        "head_dim": attends.head_dim,
        "hidden_act": hidden_act(mixture),
        "rms_norm_eps": around.norm_eps,
        "max_position_embeddings": around.max_length,
        "rope_parameters": dict(next(iter(around.ropes.values())).parameters),
        "attention_bias": attends.o_bias,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": around.tied,
        "dtype": str(child.dtype).removeprefix("torch."),
        "decoder_sparse_step": 1,
        "mlp_only_layers": only,
        "num_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_experts_per_tok,
        "moe_intermediate_size": mixture.moe_intermediate_size,
        "norm_topk_prob": mixture.norm_topk_prob,
    }
    check_as_said(child, qwen3_moe, config, READER)
    return config


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


def qwen3_moe_tensors(child: Child) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) with the experts one by one, as checkpoints on the hub have them."""
    for name, tensor in child.tensors():
        head, middle, matrix = name.partition(".mlp.experts.")
        if not middle:
            yield name, tensor
            continue
        for index, expert in enumerate(tensor):
            yield f"{head}{middle}{index}.{matrix}.weight", expert


def usual(structure: Structure, kind: type[SubBlock]) -> Any:
    """What most layers that have this kind have; None where none has."""
    counted = Counter(sub_block for _, _, sub_block in structure if isinstance(sub_block, kind)).most_common(1)
    return counted[0][0] if counted else None


def _differs(own: SubBlock, said: SubBlock | None) -> str:
    """In words, what of a sub-block the format does not say."""
    if said is None or type(own) is not type(said):
        return f"has no place for '{own.key()}'"
    names = [f.name for f in fields(own) if getattr(own, f.name) != getattr(said, f.name)]
    values = ", ".join(f"{name} {getattr(own, name)} beside {getattr(said, name)}" for name in names)
    return f"has one value for all layers, and this one has {values}"
