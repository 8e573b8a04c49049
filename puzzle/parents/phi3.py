"""Phi-3 and Phi-4: Llama with one matrix for q, k and v and one for gate and up; partial RoPE, longrope, one window."""

from __future__ import annotations

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.family import Config, attention, decoder, family, ffn
from puzzle.parents.names import MODULES, Where, plain
from puzzle.parents.structure import Structure


def fused(layer: int, slot: str, sub_block: SubBlock, name: str) -> Where:
    """q, k, v in the rows of `qkv_proj`, gate and up in those of `gate_up_proj`."""
    stored, sizes = "", {}
    if isinstance(sub_block, Gqa):
        queries, keys = (n * sub_block.head_dim for n in (sub_block.num_attention_heads, sub_block.num_key_value_heads))
        stored, sizes = "qkv_proj.weight", {"q_proj.weight": queries, "k_proj.weight": keys, "v_proj.weight": keys}
    elif isinstance(sub_block, SwiGLU):
        stored = "gate_up_proj.weight"
        sizes = dict.fromkeys(("gate_proj.weight", "up_proj.weight"), sub_block.intermediate_size)
    if name not in sizes:
        return plain(layer, slot, sub_block, name)
    begin = sum(list(sizes.values())[: list(sizes).index(name)])
    return Where(f"model.layers.{layer}.{MODULES[slot]}.{stored}", (begin, begin + sizes[name]))


@family("phi3", where=fused)
def phi3(c: Config) -> Structure:
    layer = {"attention": attention(c, window=c.get("sliding_window")), "ffn": ffn(c)}
    return decoder(c, [layer] * c["num_hidden_layers"])
