"""`--format nemotron-h` and `nemotron-h-puzzle`: a hybrid child in blocks of one mixer, which engines read with their own model code.

Plain is for children whose blocks of a kind are all alike. The other has an entry a block (`block_configs`) that says what is its own:
of FFNs the width, of experts all numbers, of attention the window and the heads; Mamba-2 is alike in both. What is left out of a layer is no block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import Normed, SubBlock
from puzzle.export.child import Child, ChildLayer
from puzzle.export.engines import PLAIN_HYBRID, PUZZLE_HYBRID
from puzzle.parents.nemotron_h import EXPERTS, NO_LIMIT, nemotron_h, nemotron_h_puzzle, where

OWN = {  # fields of a sub-block that an entry of `block_configs` says, in its words
    "gqa": {
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "window": "sliding_window",
    },
    "relu2": {"intermediate_size": "intermediate_size"},
    "moe": EXPERTS,
    "mamba2": {},
}
KINDS = {  # block_type and letter of the pattern
    "gqa": ("attention", "*"),
    "relu2": ("mlp", "-"),
    "moe": ("moe", "E"),
    "mamba2": ("mamba", "M"),
}
ATTENDS_BY_BLOCK = (None, "vllm")  # engines that read what an attention has of its own
STEP_MIN = 1e-30  # at which transformers holds steps of time
REST = "write `format` hf, which transformers reads"


@dataclass(frozen=True, slots=True)
class Block:
    """One sub-block of a child that does something."""

    layer: ChildLayer
    slot: str
    sub_block: Normed

    @property
    def where(self) -> str:
        return f"layer {self.layer.origin} {self.slot}"


def blocks_of(child: Child) -> list[Block]:
    """In order. Raises UserError for what Nemotron-H has no words for."""
    found = []
    for layer in child.layers:
        for slot, sub_block in layer.slots.items():
            if isinstance(sub_block, NoOp):
                continue
            where = f"layer {layer.origin} {slot}: Nemotron-H"
            if (what := _unlike(sub_block, child.around.norm_eps)) is not None:
                raise UserError(f"{where} has no {what}: {REST}")
            assert isinstance(sub_block, Normed)
            found.append(Block(layer, slot, sub_block))
    for what, value, plain in (
        ("scaled embeddings", child.around.embedding_scale, 1.0),
        ("scaled logits", child.around.logits_divisor, 1.0),
        ("final norm whose scale is 1 + weight", child.around.norm_offset, False),
    ):
        if value != plain:
            raise UserError(f"Nemotron-H has no {what} ({value}): {REST}")
    if not found:
        raise UserError(f"{child.name} has no sub-block that does anything: {REST}")
    return found


def _unlike(sub_block: SubBlock, norm_eps: float) -> str | None:
    """What of a sub-block Nemotron-H's words do not say."""
    if sub_block.kind not in KINDS or not isinstance(sub_block, Normed):
        return f"sub-blocks of kind '{sub_block.kind}'"
    if sub_block.norm != "before" or sub_block.norm_offset or sub_block.residual_scale != 1:
        return "norms after sub-blocks, scales of 1 + weight or factors on what a sub-block adds"
    if sub_block.norm_eps != norm_eps:
        return f"norm_eps of its own for a block ({sub_block.norm_eps:g} beside {norm_eps:g})"
    if isinstance(sub_block, Moe):
        alike = (sub_block.router, sub_block.correction_bias, sub_block.activation) == ("sigmoid", True, "relu2")
        if not alike or sub_block.shared_intermediate_size is None or sub_block.shared_gate or sub_block.bias:
            return "experts but of squared ReLUs beside a shared one, chosen by sigmoids with a correction bias"
    if isinstance(sub_block, Gqa):
        if sub_block.rope is not None:
            return "attention with rotary positions"
        biased = sub_block.qkv_bias or sub_block.o_bias
        if biased or sub_block.qk_norm is not None or sub_block.scale is not None or sub_block.sinks:
            return "biases, norms, sinks or scale of its own in attention"
    return None


def hybrid_config(child: Child, format: str, engine: str | None) -> dict[str, Any]:
    """config.json in one of the two formats. Raises UserError, naming two layers and what they differ in, for what is not alike."""
    blocks, puzzle = blocks_of(child), format == PUZZLE_HYBRID
    engine = engine and engine.partition("==")[0]
    shared: dict[str, Normed] = {}
    for kind in KINDS:
        own = [block for block in blocks if block.sub_block.kind == kind]
        _check_alike(own, puzzle, engine)
        if own:
            shared[kind] = own[0].sub_block
    attends, gated = shared.get("gqa", child.base.get("attention")), shared.get("relu2", child.base.get("ffn"))
    around, config = child.around, _around(child, puzzle)
    config["hybrid_override_pattern"] = "".join(KINDS[block.sub_block.kind][1] for block in blocks)
    config["num_hidden_layers"] = len(blocks)
    if isinstance(attends, Gqa):
        heads = [block.sub_block.num_key_value_heads for block in blocks if isinstance(block.sub_block, Gqa)]
        config |= {
            "num_attention_heads": attends.num_attention_heads,
            "num_key_value_heads": max(heads, default=attends.num_key_value_heads),
            "head_dim": attends.head_dim,
        }
    if isinstance(gated, Relu2):
        config |= {"mlp_bias": gated.bias} | ({} if puzzle else {"intermediate_size": gated.intermediate_size})
    if "moe" in shared:
        config |= {"n_shared_experts": 1} | ({} if puzzle else _words(shared["moe"]))
    if isinstance(mamba := shared.get("mamba2"), Mamba2):
        config |= _mamba_config(mamba)
    if puzzle:
        config["block_configs"], config["mtp_block_configs"] = [_entry(block.sub_block) for block in blocks], []
    read = nemotron_h_puzzle if puzzle else nemotron_h
    said = [b for _, _, b in read(config) if not isinstance(b, NoOp)]
    for block, one in zip(blocks, said, strict=True):
        if block.sub_block != one:
            raise UserError(f"{block.where}: Nemotron-H has no words for '{block.sub_block.key()}': {REST}")
    assert around.norm_eps == config["layer_norm_epsilon"]
    return config


def _check_alike(blocks: list[Block], puzzle: bool, engine: str | None) -> None:
    """Raise UserError unless all blocks of a kind are one, but for what an entry may say."""
    for block in blocks:
        first, here = blocks[0].sub_block, block.sub_block
        allowed = OWN[here.kind] if puzzle else {}
        if isinstance(here, Moe) and engine == "mlx" and (what := _unlike_mlx(here)) is not None:
            raise UserError(f"{block.where}: mlx {what}: {REST}")
        for f in fields(here):
            ours, theirs = getattr(here, f.name), getattr(first, f.name)
            other = f", or `format` {PUZZLE_HYBRID}" if f.name in OWN[here.kind] and not puzzle else ""
            if f.name == "window" and ours is not None and not puzzle:
                raise UserError(
                    f"{block.where}: `format` {PLAIN_HYBRID} has no windows (this one's is {ours}): {REST}{other}"
                )
            if ours != theirs and f.name not in allowed:
                raise UserError(
                    f"{block.where}: {f.name} is {ours}, and {theirs} in {blocks[0].where}; `format` "
                    f"{PUZZLE_HYBRID if puzzle else PLAIN_HYBRID} has one for all blocks of kind '{here.kind}': {REST}{other}"
                )
            if (
                isinstance(here, Gqa)
                and ((f.name == "window" and ours) or ours != theirs)
                and engine not in ATTENDS_BY_BLOCK
            ):
                raise UserError(
                    f"{block.where}: {engine} passes over what an attention has of its own ({f.name} {ours}): {REST}"
                )


def _unlike_mlx(experts: Moe) -> str | None:
    """What mlx-lm's router does otherwise."""
    if experts.num_groups > 1:
        return "holds the scores of other groups of experts at 0, which a correction bias may still choose"
    if experts.num_experts_per_tok == 1 and experts.norm_topk_prob:
        return "does not divide the weight of a token's only expert by itself"
    return None


def _around(child: Child, puzzle: bool) -> dict[str, Any]:
    around, dtype = child.around, child.dtype_name
    name, file = ("NemotronHPuzzle", "nemotron_h_puzzle") if puzzle else ("NemotronH", "nemotron_h")
    code = {
        "AutoConfig": f"configuration_{file}.{name}Config",
        "AutoModelForCausalLM": f"modeling_{file}.{name}ForCausalLM",
    }
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": file,
        **({"auto_map": code} if puzzle else {}),
        "vocab_size": around.vocab_size,
        "hidden_size": around.hidden_size,
        "layer_norm_epsilon": around.norm_eps,
        "rms_norm_eps": around.norm_eps,  # some readers' name of the same
        "max_position_embeddings": around.max_length,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "attention_bias": False,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": around.hidden_size,
        **({} if puzzle else {"intermediate_size": 1}),
        "tie_word_embeddings": False,
        "residual_in_fp32": False,
        "use_cache": True,
        "bos_token_id": child.bos_token_id,
        "eos_token_id": child.eos_token_id,
        "pad_token_id": child.pad_token_id,
        "initializer_range": child.kept.get("initializer_range", 0.02),
        "dtype": dtype,
        "torch_dtype": dtype,
        "parent_name": child.parent_name,
    }


def _mamba_config(mamba: Mamba2) -> dict[str, Any]:
    return {
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "n_groups": mamba.num_groups,
        "ssm_state_size": mamba.state_size,
        "conv_kernel": mamba.conv_width,
        "chunk_size": mamba.chunk_size,
        "use_conv_bias": mamba.conv_bias,
        "use_bias": mamba.bias,
        "mamba_proj_bias": mamba.bias,
        "mamba_hidden_act": "silu",
        "mamba_ssm_cache_dtype": mamba.state_dtype,
        "time_step_min": STEP_MIN,
        "time_step_limit": list(NO_LIMIT),
        "expand": 2,
    }


def _entry(sub_block: SubBlock) -> dict[str, Any]:
    """One entry of `block_configs`."""
    own = {word: value for word, value in _words(sub_block).items() if value is not None}
    latent = {"moe_latent_size": None} if isinstance(sub_block, Moe) else {}
    return {"block_type": KINDS[sub_block.kind][0]} | latent | own


def _words(sub_block: SubBlock) -> dict[str, Any]:
    """The fields in OWN, as config.json calls them."""
    return {word: getattr(sub_block, name) for name, word in OWN[sub_block.kind].items()}


def hybrid_tensors(child: Child, format: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor), block after block, experts one by one: those of hub checkpoints (`backbone.`), or of the other format (`model.`)."""
    stem = "model" if format == PUZZLE_HYBRID else "backbone"
    yield f"{stem}.embeddings.weight", child.read_embedding()
    for index, block in enumerate(blocks_of(child)):
        tensors = block.layer.read(block.slot)
        for name in sorted(tensors):
            place, tensor = where(index, block.slot, block.sub_block, name), tensors.pop(name)
            for stored, part in zip(place.names, [tensor] if place.experts is None else tensor, strict=True):
                yield stem + stored.removeprefix("model"), part
    yield f"{stem}.norm_f.weight", child.read_final_norm()
    yield "lm_head.weight", child.read_embedding() if child.tied else child.read_head()
