"""`--format gpt-oss`: a child whose layers are alike as a plain GptOssForCausalLM in bf16, which stock engines read with their own code.

One number of KV heads, of experts, of a token's experts and of channels. Engines know more of a gpt-oss by themselves than its config says
(vLLM 0.26 and 0.32: `models/gpt_oss.py`): what they would pass over is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.moe import Moe
from puzzle.export.alike import REST, check_as_said, usual, usual_mixture, words_around
from puzzle.export.child import Child
from puzzle.parents.gpt_oss import gpt_oss, in_bf16
from puzzle.parents.names import EMBEDDING, FINAL_NORM, HEAD, stored_tensors
from puzzle.parents.structure import Structure

GPT_OSS = "gpt-oss"
READER = f"`format` {GPT_OSS}"
# Without default, but for truncate.
ROPE = {"rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}


def gpt_oss_config(child: Child) -> dict[str, Any]:
    """config.json. Raises UserError for what the format has no words for: the first layer, and what of it is not as in the others."""
    structure = child.structure
    attends, mixture = usual_mixture(child, READER)
    attentions = [layer.get("attention") for layer in structure.layers]
    found = [one.window if isinstance(one, Gqa) else None for one in attentions]
    window = max((one for one in found if one is not None), default=None)
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **words_around(child, attends),
        "intermediate_size": mixture.moe_intermediate_size,
        "head_dim": attends.head_dim,
        "hidden_act": "silu",
        "sliding_window": window,
        "layer_types": ["full_attention" if one is None else "sliding_attention" for one in found],
        "num_local_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_experts_per_tok,
        "swiglu_limit": 7.0,
    }
    check_as_said(child, gpt_oss, config, READER)
    _check_known(child, structure, found)
    return config


def _check_known(child: Child, structure: Structure, windows: list[int | None]) -> None:
    """Raise UserError for what engines take for granted, and is otherwise here."""
    rope = next(iter(structure.ropes.values()))
    turns = [n % 2 == 0 for n in range(len(windows))]
    for wrong, what in (
        (any(windows) and [one is not None for one in windows] != turns, "windows in layers 0, 2, 4 … and no others"),
        (rope.kind != "yarn" or set(rope.parameters) - {"rope_type", "type", "truncate"} != ROPE, f"a RoPE of type yarn with {', '.join(sorted(ROPE))} alone"),
        (structure.max_length > rope.parameters.get("factor", 1) * rope.original_length,
         "tables of factor · original_max_position_embeddings positions, beyond which they read what stands behind,"),
        ({b.norm_eps for _, _, b in structure if isinstance(b, Gqa | Moe)} | {structure.norm_eps} != {1e-5}, "rms_norm_eps 1e-05"),
        (not usual(structure, Gqa).o_bias, "biases in attention"),
        (structure.tied, "a head of its own"),
    ):  # fmt: skip
        if wrong:
            raise UserError(f"{child.name}: engines know {READER} with {what} whatever its config says: {REST}")


def gpt_oss_tensors(child: Child) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as checkpoints in bf16 have them: gate and up in turn, transposed."""
    yield EMBEDDING, child.read_embedding()
    for index, layer in enumerate(child.layers):
        for slot, sub_block in layer.slots.items():
            parts = ((in_bf16(index, slot, sub_block, name), tensor) for name, tensor in layer.read(slot).items())
            for name, tensor in sorted(stored_tensors(parts)):
                yield name, tensor.contiguous()
    yield FINAL_NORM, child.read_final_norm()
    yield HEAD, child.read_head()
