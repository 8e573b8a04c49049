"""Granite-3: Llama with four multipliers, on the embedding, the scores, what each sub-block adds, and the logits; Granite-4's layers with
attention, whose FFN is a mixture of experts beside a shared one, or that one alone."""

from __future__ import annotations

from puzzle.base.errors import UserError
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.family import Config, attention, decoder, family, ffn, moe
from puzzle.parents.names import Where, plain
from puzzle.parents.structure import Structure

ATTENDS = ("attention", "full_attention")  # of `layer_types`


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


@family("granitemoehybrid", where=flat)
def granitemoehybrid(c: Config) -> Structure:
    residual = {"residual_scale": float(c["residual_multiplier"])}
    for index, kind in enumerate(c["layer_types"]):
        if kind not in ATTENDS:
            raise UserError(
                f"layer_types[{index}] = '{kind}' in config.json is not supported: layers with attention are"
            )
    for name in [name for name in c if name.startswith("mamba_")] + ["time_step_limit"]:
        c.get(name)  # which only a layer with Mamba-2 reads
    rope = "default" if c["position_embedding_type"] == "rope" else None
    attends = attention(c, scale=float(c["attention_multiplier"]), rope=rope, **residual)
    mixed = {**c, "moe_intermediate_size": c["intermediate_size"], "norm_topk_prob": True}
    shared = c["shared_intermediate_size"]
    if c["num_local_experts"]:
        gated: SubBlock = moe(mixed, shared_intermediate_size=shared, **residual)
    else:
        gated = ffn(c, intermediate_size=shared, **residual)
    return decoder(c, [{"attention": attends, "ffn": gated}] * c["num_hidden_layers"], **around(c))
