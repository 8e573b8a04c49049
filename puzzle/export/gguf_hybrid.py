"""Hybrid children as llama.cpp reads them: architecture `nemotron_h`, or `nemotron_h_moe` where FFNs are mixtures of experts.

A block is one mixer. By its arrays a block without KV heads and FFN is Mamba-2, one with KV heads attention, the others FFNs; widths,
top-k and heads are by block, and everything else is one for all: Mamba-2, head_dim, how many experts there are and what their router does.
Read in llama.cpp as of llama-cpp-python 0.3.36: src/models/nemotron-h.cpp, mamba-base.cpp, conversion/nemotron.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import SubBlock
from puzzle.export.child import Child
from puzzle.export.engines import PUZZLE_HYBRID
from puzzle.export.nemotron_h import Block, blocks_of

ARCHITECTURES = ("nemotron_h", "nemotron_h_moe")
NORM = {"norm.weight": "attn_norm.weight"}
TENSOR_NAMES = {  # of a block, by its kind
    "gqa": NORM | {f"{ours}_proj.weight": f"attn_{theirs}.weight" for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True)},
    "mamba2": NORM | {
        "in_proj.weight": "ssm_in.weight", "conv1d.weight": "ssm_conv1d.weight", "conv1d.bias": "ssm_conv1d.bias", "dt_bias": "ssm_dt.bias",
        "A_log": "ssm_a", "D": "ssm_d", "gate_norm.weight": "ssm_norm.weight", "out_proj.weight": "ssm_out.weight",
    },
    "relu2": NORM | {f"{name}_proj.{part}": f"ffn_{name}.{part}" for name in ("up", "down") for part in ("weight", "bias")},
    "moe": NORM | {
        "gate.weight": "ffn_gate_inp.weight", "gate.e_score_correction_bias": "exp_probs_b.bias",
        **{f"experts.{name}_proj": f"ffn_{name}_exps.weight" for name in ("up", "down")},
        "fc1_latent_proj.weight": "ffn_latent_down.weight", "fc2_latent_proj.weight": "ffn_latent_up.weight",
        **{f"shared_expert.{name}_proj.weight": f"ffn_{name}_shexp.weight" for name in ("up", "down")},
    },
}  # fmt: skip
BY_BLOCK = (
    "num_attention_heads", "num_key_value_heads", "window", "intermediate_size", "bias", "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
MOST_BLOCKS, MOST_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
REST = f"write `format` {PUZZLE_HYBRID}, or `format` hf, which transformers reads"


def architecture(child: Child) -> str:
    """The name of it, in the file's metadata."""
    return ARCHITECTURES[any(isinstance(sub_block, Moe) for sub_block in child.sub_blocks)]


def hybrid_blocks(child: Child) -> list[Block]:
    """In order. Raises UserError, naming block and field, for what neither architecture can say or computes otherwise."""
    blocks = blocks_of(child)
    first: dict[str, Block] = {}
    for block in blocks:
        here, one = block.sub_block, first.setdefault(block.sub_block.kind, block)
        if isinstance(here, Gqa) and child.reach(here) is not None:
            raise UserError(f"{block.where}: llama.cpp has no windows in hybrids (this one's is {here.window}): {REST}")
        if isinstance(here, Mamba2) and here.bias:
            raise UserError(f"{block.where}: llama.cpp reads no biases of Mamba-2's projections: {REST}")
        if "moe" in first and "relu2" in first:
            raise UserError(
                f"{block.where}: llama.cpp has experts in all FFNs or in none, and here is '{here.kind}' after "
                f"'{'relu2' if isinstance(here, Moe) else 'moe'}': choose one of the two for all layers, or {REST}"
            )
        for f in fields(here):
            ours, theirs = getattr(here, f.name), getattr(one.sub_block, f.name)
            if ours != theirs and f.name not in (*BY_BLOCK, "chunk_size", "state_dtype"):
                raise UserError(
                    f"{block.where}: {f.name} is {ours}, and {theirs} in {one.where}; llama.cpp has one for all blocks of kind "
                    f"'{here.kind}': {REST}"
                )
    experts = first["moe"].sub_block.num_experts if "moe" in first else 0  # type: ignore[attr-defined]
    for what, found, most in (("blocks", len(blocks), MOST_BLOCKS), ("experts", experts, MOST_EXPERTS)):
        if found > most:
            raise UserError(f"llama.cpp has at most {most} {what}, and {child.name} has {found}: {REST}")
    return blocks


def hybrid_metadata(child: Child) -> dict[str, Any]:
    """What these architectures read beside what all do; by block where blocks differ, else one number, which older readers take too."""
    name, subs = architecture(child), [block.sub_block for block in hybrid_blocks(child)]
    attends, mixes, experts = (_first(subs, kind) for kind in (Gqa, Mamba2, Moe))
    if attends is None or mixes is None:
        what = "Mamba-2" if mixes is None else "attention"
        raise UserError(f"{child.name} has no {what}, without which llama.cpp ends: lower it for llama.cpp")
    found: dict[str, Any] = {
        "feed_forward_length": [_width(b) for b in subs],
        "attention.head_count_kv": [b.num_key_value_heads if isinstance(b, Gqa) else 0 for b in subs],
        "attention.layer_norm_epsilon": child.around.norm_eps,
        "attention.layer_norm_rms_epsilon": child.around.norm_eps,
        # Read of the first block whatever it is, to tell whether anything attends.
        "attention.head_count": _by_block([b.num_attention_heads if isinstance(b, Gqa) else None for b in subs]),
        "attention.key_length": attends.head_dim,
        "attention.value_length": attends.head_dim,
        "ssm.conv_kernel": mixes.conv_width,
        "ssm.inner_size": mixes.inner_size,
        "ssm.state_size": mixes.state_size,
        "ssm.time_step_rank": mixes.num_heads,
        "ssm.group_count": mixes.num_groups,
    }
    if experts is not None:
        found |= {
            "expert_count": experts.num_experts,
            "expert_used_count": _by_block([b.num_experts_per_tok if isinstance(b, Moe) else None for b in subs], 0),
            "expert_feed_forward_length": _by_block([_width(b) or None for b in subs], 0),
            "expert_shared_feed_forward_length": experts.shared_intermediate_size,
            "expert_shared_count": 1,
            "expert_weights_norm": experts.norm_topk_prob,
            "expert_weights_scale": experts.routed_scaling_factor,
        }
        if experts.latent_size is not None:
            found["moe_latent_size"] = experts.latent_size
        if experts.num_topk_groups < experts.num_groups:  # looking at all of them limits nothing
            found |= {"expert_group_count": experts.num_groups, "expert_group_used_count": experts.num_topk_groups}
    return {f"{name}.{key}": value for key, value in found.items()}


def stored_shape(sub_block: SubBlock, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As the file has a tensor of a block."""
    if isinstance(sub_block, Mamba2):
        if name == "gate_norm.weight":
            return (sub_block.num_groups, shape[0] // sub_block.num_groups)
        if name == "conv1d.weight":
            return (shape[0], shape[2])
        if name in ("A_log", "D"):
            return (shape[0], 1)
    return shape


def stored(sub_block: SubBlock, name: str, tensor: Tensor) -> Tensor:
    tensor = -tensor.float().exp() if name == "A_log" else tensor
    return tensor.reshape(stored_shape(sub_block, name, tuple(tensor.shape)))


def is_matrix(name: str) -> bool:
    """Whether it is stored in the type of matrices; the router is float32, as llama.cpp's own conversion has it."""
    return "_proj" in name and not name.endswith(".bias")


def _first(subs: Sequence[SubBlock], kind: type[Any]) -> Any:
    return next((b for b in subs if isinstance(b, kind)), None)


def _width(sub_block: SubBlock) -> int:
    if isinstance(sub_block, Moe):
        return sub_block.moe_intermediate_size
    return sub_block.intermediate_size if isinstance(sub_block, Relu2) else 0


def _by_block(values: list[int | None], absent: int | None = None) -> list[int] | int | None:
    """One number where all that have one agree, else a list, with `absent` (None: the largest) for those that have none."""
    own = {value for value in values if value is not None}
    if len(own) < 2:
        return next(iter(own), None)
    return [(max(own) if absent is None else absent) if value is None else value for value in values]
