"""Qwen3-MoE: Qwen3 with a mixture of experts in some or all layers. Experts are stored one by one (hub), or fused."""

from __future__ import annotations

from puzzle.blocklib.moe import Moe
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.family import Config, attention, decoder, family, ffn, moe
from puzzle.parents.names import MODULES, Where, plain
from puzzle.parents.structure import Layer, Structure


def one_by_one(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    """`mlp.experts.7.up_proj.weight`, as transformers saves it."""
    owner, _, matrix = name.partition(".")
    if not isinstance(sub_block, Moe) or owner != "experts":
        return plain(layer, slot, sub_block, name)
    return Where(f"model.layers.{layer}.{MODULES[slot]}.experts.{{}}.{matrix}.weight", experts=sub_block.num_experts)


def fused(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    """`mlp.experts.gate_up_proj` [E, 2 F, H] and `mlp.experts.down_proj` [E, H, F], as transformers holds it."""
    owner, _, matrix = name.partition(".")
    if not isinstance(sub_block, Moe) or owner != "experts" or matrix == "down_proj":
        return plain(layer, slot, sub_block, name)
    begin = sub_block.moe_intermediate_size * ("gate_proj", "up_proj").index(matrix)
    stored = f"model.layers.{layer}.{MODULES[slot]}.experts.gate_up_proj"
    return Where(stored, (begin, begin + sub_block.moe_intermediate_size), dim=1)


def mixture(c: Config) -> Layer:
    """What a layer has that is not dense."""
    return {"attention": attention(c, window=c.get("sliding_window"), qk_norm="head"), "ffn": moe(c)}


@family("qwen3_moe", where=one_by_one, other_layouts=(fused,), base=mixture)
def qwen3_moe(c: Config) -> Structure:
    """Layers are dense by `mlp_only_layers`, and but for every `decoder_sparse_step`-th."""
    only, step, usual = c.get("mlp_only_layers") or (), c["decoder_sparse_step"], mixture(c)
    c["intermediate_size"]  # which nothing reads where no layer is dense
    sparse = [index not in only and (index + 1) % step == 0 for index in range(c["num_hidden_layers"])]
    return decoder(c, [usual if is_moe else {**usual, "ffn": ffn(c)} for is_moe in sparse])
