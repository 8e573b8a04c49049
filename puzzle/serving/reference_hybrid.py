"""A hybrid's GGUF file read back: every block's kind and sizes from its tensors, and from the metadata what tensors do not tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import SubBlock
from puzzle.export.gguf_hybrid import TENSOR_NAMES
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Structure
from puzzle.runtime.model import Block, CausalModel


def load_hybrid_gguf(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> CausalModel:
    """tensors: all of the file, in float32, by its names."""
    stem = f"{values['general.architecture']}."
    told = {key.removeprefix(stem): value for key, value in values.items() if key.startswith(stem)}
    eps, hidden = float(told["attention.layer_norm_rms_epsilon"]), tensors["token_embd.weight"].shape[1]
    layers, blocks = [], []
    for index in range(told["block_count"]):
        at = f"blk.{index}."
        own = {name.removeprefix(at): tensor for name, tensor in tensors.items() if name.startswith(at)}
        here = {key: value[index] if isinstance(value, list) else value for key, value in told.items()}
        sub_block = _sub_block(own, here, {"hidden_size": hidden, "norm_eps": eps})
        names = TENSOR_NAMES[sub_block.kind]
        weights = {name: own[names[name]].reshape(shape) for name, shape in sub_block.tensors().items()}
        if isinstance(sub_block, Mamba2):
            weights["A_log"] = (-weights["A_log"]).log()
        slot, other = ("attention", "ffn") if isinstance(sub_block, Gqa | Mamba2) else ("ffn", "attention")
        layers.append({slot: sub_block, other: NO_OP})
        blocks.append(Block({slot: loaded(sub_block, weights), other: loaded(NO_OP, {})}))
    embedding, head, length = tensors["token_embd.weight"], tensors.get("output.weight"), int(told["context_length"])
    rope = Rope(
        head_dim=told["attention.key_length"], max_length=length, parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    structure = Structure(
        hidden_size=hidden, vocab_size=len(embedding), max_length=length, tied=head is None, norm_eps=eps,
        ropes={"default": rope}, layers=tuple(layers),
    )  # fmt: skip
    model = CausalModel(structure, embedding, blocks, tensors["output_norm.weight"], head)
    return model.requires_grad_(False).eval()


def _sub_block(own: Mapping[str, Tensor], told: Mapping[str, Any], norm: dict[str, Any]) -> SubBlock:
    def rows(name: str) -> int:
        return len(own[f"{name}.weight"])

    if "ssm_in.weight" in own:
        groups, heads = rows("ssm_norm"), len(own["ssm_a"])
        inner = own["ssm_out.weight"].shape[1]
        return Mamba2(
            **norm, num_heads=heads, head_dim=inner // heads, num_groups=groups, conv_width=own["ssm_conv1d.weight"].shape[1],
            state_size=(rows("ssm_conv1d") - inner) // (2 * groups),
        )  # fmt: skip
    if "attn_q.weight" in own:
        dim = told["attention.key_length"]
        q, kv = rows("attn_q") // dim, rows("attn_k") // dim
        return Gqa(**norm, num_attention_heads=q, num_key_value_heads=kv, head_dim=dim, rope=None)
    if "ffn_gate_inp.weight" not in own:
        return Relu2(**norm, intermediate_size=rows("ffn_up"), bias="ffn_up.bias" in own)
    return Moe(
        **norm, num_experts=rows("ffn_gate_inp"), num_experts_per_tok=told["expert_used_count"], router="sigmoid", correction_bias=True,
        moe_intermediate_size=own["ffn_up_exps.weight"].shape[1], shared_intermediate_size=rows("ffn_up_shexp"), activation="relu2",
        latent_size=rows("ffn_latent_down") if "ffn_latent_down.weight" in own else None,
        norm_topk_prob=told["expert_weights_norm"], routed_scaling_factor=float(told["expert_weights_scale"]),
        num_groups=told.get("expert_group_count", 1), num_topk_groups=told.get("expert_group_used_count", 1),
    )  # fmt: skip
