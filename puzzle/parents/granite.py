"""Granite-3: Llama with four multipliers, on the embedding, the scores, what each sub-block adds, and the logits; Granite-4: layers of
attention or Mamba-2, whose FFN is a mixture of experts beside a shared one, or that one alone."""

from __future__ import annotations

from typing import Any

from puzzle.base.errors import UserError
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.family import Config, attention, decoder, family, ffn, head_dim, moe
from puzzle.parents.names import Where, plain
from puzzle.parents.structure import Layer, Structure

# Earlier names and today's.
TYPES = {"attention": "gqa", "full_attention": "gqa", "mamba": "mamba2", "linear_attention": "mamba2"}
MAMBA = {  # fields of Mamba-2, and their words in config.json
    "num_heads": "mamba_n_heads", "head_dim": "mamba_d_head", "num_groups": "mamba_n_groups", "state_size": "mamba_d_state",
    "conv_width": "mamba_d_conv", "chunk_size": "mamba_chunk_size", "conv_bias": "mamba_conv_bias", "bias": "mamba_proj_bias",
}  # fmt: skip


def around(c: Config) -> dict[str, float]:
    return {"embedding_scale": float(c["embedding_multiplier"]), "logits_divisor": float(c["logits_scaling"])}


@family("granite")
def granite(c: Config) -> Structure:
    residual = {"residual_scale": float(c["residual_multiplier"])}
    scores = {"scale": float(c["attention_multiplier"])}
    layer = {"attention": attention(c, **scores, **residual), "ffn": ffn(c, **residual)}
    return decoder(c, [layer] * c["num_hidden_layers"], **around(c))


def flat(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    """`block_sparse_moe.input_linear` [E, 2 F, H], gate above up, and `shared_mlp.input_linear` [2 S, H], as on the hub."""
    owner, _, matrix = name.removesuffix(".weight").rpartition(".")
    if slot != "ffn" or "norm" in name:
        return plain(layer, slot, sub_block, name)
    prefix = f"model.layers.{layer}."
    if owner == "" and matrix == "gate":
        return Where(f"{prefix}block_sparse_moe.router.layer.weight")
    dim = 1 if owner == "experts" else 0
    prefix += "block_sparse_moe" if owner == "experts" else "shared_mlp"
    if matrix == "down_proj":
        return Where(f"{prefix}.output_linear.weight")
    shape = sub_block.tensors()[name]
    begin = shape[dim] * ("gate_proj", "up_proj").index(matrix)
    return Where(f"{prefix}.input_linear.weight", (begin, begin + shape[dim]), dim=dim)


def mamba(c: Config, **changes: Any) -> Mamba2:
    """Raises UserError for steps of time with limits, and for activations but silu."""
    if c["hidden_act"] != "silu":
        raise UserError(f"hidden_act '{c['hidden_act']}' in config.json is not supported for Mamba-2: silu is")
    low, high = c.get("time_step_limit") or (0.0, float("inf"))
    if low > 0 or high < float("inf"):
        raise UserError(
            f"time_step_limit = {[low, high]} in config.json is not supported: steps of time without limits, [0.0, inf], are"
        )
    own = {name: c[word] for name, word in MAMBA.items()}
    return Mamba2(hidden_size=c["hidden_size"], norm_eps=float(c["rms_norm_eps"]), **own | changes)


def attends(c: Config) -> Layer:
    """A layer with attention."""
    residual: dict[str, Any] = {"residual_scale": float(c["residual_multiplier"])}
    scale: float | None = float(c["attention_multiplier"])
    scale = None if scale == head_dim(c) ** -0.5 else scale
    rope = "default" if c["position_embedding_type"] == "rope" else None
    mixed = {**c, "moe_intermediate_size": c["intermediate_size"], "norm_topk_prob": True}
    shared = c["shared_intermediate_size"]
    if c["num_local_experts"]:
        gated: SubBlock = moe(mixed, shared_intermediate_size=shared, **residual)
    else:
        gated = ffn(c, intermediate_size=shared, **residual)
    return {"attention": attention(c, scale=scale, rope=rope, **residual), "ffn": gated}


@family("granitemoehybrid", where=flat, base=attends)
def granitemoehybrid(c: Config) -> Structure:
    usual, kinds = attends(c), [TYPES.get(kind) for kind in c["layer_types"]]
    if None in kinds:
        wrong = kinds.index(None)
        raise UserError(
            f"layer_types[{wrong}] = '{c['layer_types'][wrong]}' in config.json is not supported: {', '.join(TYPES)} are"
        )
    for name in (*MAMBA.values(), "mamba_expand", "time_step_limit", "num_experts_per_tok", "hidden_act"):
        c.get(name)  # which only a layer with Mamba-2, or with experts, reads
    made: dict[str | None, Layer] = {"gqa": usual}
    if "mamba2" in kinds:
        made["mamba2"] = {**usual, "attention": mamba(c, residual_scale=float(c["residual_multiplier"]))}
    return decoder(c, [made[kind] for kind in kinds], **around(c))
