"""`--format granitemoehybrid`: a child some of whose attentions are Mamba-2 as a plain GraniteMoeHybridForCausalLM, which stock engines read
with their own code.

One kind of attention, of Mamba-2 and of FFN for all layers that have one; a dense FFN is the format's shared expert without any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child
from puzzle.export.engines import GRANITE_HYBRID
from puzzle.export.qwen3_moe import REST, check_as_said, usual
from puzzle.parents.child import hidden_act
from puzzle.parents.granite import MAMBA, flat, granitemoehybrid
from puzzle.parents.names import stored_tensors

READER = f"`format` {GRANITE_HYBRID}"


def granite_hybrid_config(child: Child, engine: str | None) -> dict[str, Any]:
    """config.json. engine: that will read it, None for any. Raises UserError for what the format has no words for: the first layer, and what of it is not as in the others."""
    around, structure = child.around, child.structure
    attends, mamba, mixture, dense = (usual(structure, kind) for kind in (Gqa, Mamba2, Moe, SwiGLU))
    gated = mixture or dense
    if attends is None or gated is None:
        what = "FFN" if gated is None else "attention"
        raise UserError(f"{child.name} has no {what}, which readers of {READER} count on: {REST}")
    if isinstance(gated, Moe) and gated.shared_intermediate_size is None:
        raise UserError(f"{child.name} has experts without a shared one, which {READER} has beside them: {REST}")
    config = {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        **child.kept,
        "vocab_size": around.vocab_size,
        "hidden_size": around.hidden_size,
        "num_hidden_layers": structure.num_layers,
        "layer_types": ["mamba" if isinstance(layer.attention, Mamba2) else "attention" for layer in child.layers],
        "num_attention_heads": attends.num_attention_heads,
        "num_key_value_heads": attends.num_key_value_heads,
        "attention_bias": attends.o_bias,
        "attention_multiplier": attends.head_dim**-0.5 if attends.scale is None else attends.scale,
        "position_embedding_type": "rope" if attends.rope else "nope",
        "rope_parameters": dict(next(iter(around.ropes.values())).parameters),
        "residual_multiplier": attends.residual_scale,
        "embedding_multiplier": around.embedding_scale,
        "logits_scaling": around.logits_divisor,
        "hidden_act": hidden_act(gated),
        "intermediate_size": gated.moe_intermediate_size if isinstance(gated, Moe) else gated.intermediate_size,
        "shared_intermediate_size": gated.shared_intermediate_size or 0
        if isinstance(gated, Moe)
        else gated.intermediate_size,
        "num_local_experts": gated.num_experts if isinstance(gated, Moe) else 0,
        "num_experts_per_tok": gated.num_experts_per_tok if isinstance(gated, Moe) else 0,
        "rms_norm_eps": around.norm_eps,
        "max_position_embeddings": around.max_length,
        "tie_word_embeddings": around.tied,
        "dtype": str(child.dtype).removeprefix("torch."),
        **_mamba_config(child, mamba, engine),
    }
    check_as_said(child, granitemoehybrid, config, READER)
    return config


def _mamba_config(child: Child, mamba: Mamba2 | None, engine: str | None) -> dict[str, Any]:
    """Inner channels are a whole multiple of the hidden size in this format. Without Mamba-2: sizes that go together.

    transformers norms all of them together until 5.17, each group by itself in 5.24, as vLLM does and Mamba-2 is meant.
    """
    hidden = child.around.hidden_size
    if mamba is None:
        return {"mamba_n_heads": 1, "mamba_d_head": hidden, "mamba_expand": 1}
    if mamba.num_groups > 1 and engine != "vllm":
        raise UserError(
            f"{READER} with Mamba-2 in {mamba.num_groups} groups is another model to some readers (transformers before 5.24), which norm all "
            f"groups together: write it for `engine` vllm, solve with one group, or {REST}"
        )
    if mamba.inner_size % hidden:
        raise UserError(
            f"{READER} has Mamba-2 of whole multiples of hidden_size {hidden} channels, and {child.name}'s has {mamba.num_heads} heads "
            f"of {mamba.head_dim}: solve with such a variant, or {REST}"
        )
    return {word: getattr(mamba, name) for name, word in MAMBA.items()} | {"mamba_expand": mamba.inner_size // hidden}


def granite_hybrid_tensors(child: Child) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as checkpoints on the hub have them: gate above up, experts stacked."""
    yield "model.embed_tokens.weight", child.read_embedding()
    for index, layer in enumerate(child.layers):
        for slot, sub_block in layer.slots.items():
            read = layer.read(slot).items()
            yield from sorted(stored_tensors((flat(index, slot, sub_block, name), tensor) for name, tensor in read))
    yield "model.norm.weight", child.read_final_norm()
    if not child.tied:
        yield "lm_head.weight", child.read_head()
