"""`--format qwen3-moe`: a child whose mixtures are alike as a plain Qwen3MoeForCausalLM, which stock engines read with their own code.

One number of experts, of a token's experts and of channels for all mixtures, one width for all dense FFNs, one kind of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.alike import REST, check_as_said, usual, usual_mixture, words_around
from puzzle.export.child import Child
from puzzle.parents.child import hidden_act
from puzzle.parents.qwen3_moe import qwen3_moe

READER = "`format` qwen3-moe"


def qwen3_moe_config(child: Child) -> dict[str, Any]:
    """config.json. Raises UserError for what the format has no words for: the first layer, and what of it is not as in the others."""
    structure = child.structure
    (attends, mixture), dense = usual_mixture(child, READER), usual(structure, SwiGLU)
    if attends.window is not None:
        raise UserError(
            f"{child.name} has windows of {attends.window} tokens, which engines pass over in {READER}: {REST}"
        )
    only = [index for index, layer in enumerate(structure.layers) if isinstance(layer.get("ffn"), SwiGLU)]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **words_around(child, attends),
        "intermediate_size": mixture.active_width if dense is None else dense.intermediate_size,
        "head_dim": attends.head_dim,
        "hidden_act": hidden_act(mixture),
        "use_sliding_window": False,
        "sliding_window": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": only,
        "num_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.num_experts_per_tok,
        "moe_intermediate_size": mixture.moe_intermediate_size,
        "norm_topk_prob": mixture.norm_topk_prob,
    }
    check_as_said(child, qwen3_moe, config, READER)
    return config


def qwen3_moe_tensors(child: Child) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) with the experts one by one, as checkpoints on the hub have them."""
    for name, tensor in child.tensors():
        head, middle, matrix = name.partition(".mlp.experts.")
        if not middle:
            yield name, tensor
            continue
        for index, expert in enumerate(tensor):
            yield f"{head}{middle}{index}.{matrix}.weight", expert
