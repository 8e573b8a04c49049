"""What of a child an engine cannot take and no exact rewrite helps: said before anything is written."""

from __future__ import annotations

from collections.abc import Callable

from puzzle.base.errors import UserError
from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import Normed, SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child
from puzzle.export.engines import ANY_DECILM_READER, ENGINES, GRANITE_HYBRID, HYBRIDS, Engine

HF = "`format` hf, which transformers reads"


def refuse(child: Child, engine: Engine, format: str) -> None:
    """Raise UserError, naming layer, sub-block, engine and the nearest choice that works, or return."""
    reader = "a reader of nemotron-nas" if engine is ANY_DECILM_READER else engine.name
    refuse_unlike_llama(child, reader)
    _attention(child, engine, reader, format)
    _windows(child, engine, reader)
    _ffn(child, engine, reader)


def is_nemotron_h(child: Child) -> bool:
    """Whether FFNs of its base have no gate: what stands beside them is of blocks of one mixer."""
    ffn = child.base.get("ffn")
    return isinstance(ffn, Relu2) or (isinstance(ffn, Moe) and ffn.activation == "relu2")


def refuse_unlike_llama(child: Child, reader: str) -> None:
    """Raise UserError for what formats of Llama-like decoders (nemotron-nas, gguf's deci) have no words for.

    Every kind and field that is not known to be sayable is refused.
    """
    rest = HF
    gateless = getattr(child.base.get("ffn"), "activation", "relu2") == "relu2"
    if not gateless and any(isinstance(sub_block, Moe) for sub_block in child.sub_blocks):
        stock = "gpt-oss" if getattr(child.base.get("attention"), "sinks", False) else "qwen3-moe"
        rest = f"`format` {stock}, if all mixtures are alike, or {rest}"
    rest = f"write {rest}"
    mixed = " or ".join(HYBRIDS) if gateless else f"{GRANITE_HYBRID}, if its FFNs and its Mamba-2 are alike"
    for layer in child.layers:
        for slot, sub_block in layer.slots.items():
            where = f"layer {layer.origin} {slot}: {reader}"
            if slot not in ("attention", "ffn"):
                raise UserError(f"{where} has no slot of that name: {rest}")
            if (what := _unlike_llama(sub_block)) is not None:
                other = f"`format` {mixed}, or " if isinstance(sub_block, Mamba2 | Relu2) else ""
                rest = HF if isinstance(sub_block, GatedDelta) else rest
                raise UserError(f"{where} has no {what}: write {other}{rest.removeprefix('write ')}")
    around, attends = child.around, child.attention
    for rope in around.ropes.values():
        if rope.kind not in SAYABLE_ROPES:
            raise UserError(f"{reader} has no RoPE of type '{rope.kind}': {rest}")
        if rope.rotary_dim != rope.head_dim:
            raise UserError(
                f"{reader} turns whole heads, and this child {rope.rotary_dim} of {rope.head_dim} dimensions: {rest}"
            )
    for what, found, plain in (
        ("scaled embeddings", around.embedding_scale, 1.0),
        ("scaled logits", around.logits_divisor, 1.0),
        ("norms whose scale is 1 + weight", around.norm_offset, False),
    ):
        if found != plain:
            raise UserError(f"{reader} has no {what} ({found}): {rest}")
    shared = ("num_attention_heads", "head_dim", "qkv_bias", "o_bias")
    for layer in child.layers:
        for name in shared if isinstance(layer.attention, Gqa) else ():
            own, usual = getattr(layer.attention, name), getattr(attends, name)
            if own != usual:
                raise UserError(
                    f"layer {layer.origin} attention: {reader} has one {name} for all layers, and this one's is {own} beside "
                    f"{usual}: {rest}"
                )


SAYABLE_ROPES = ("default", "linear", "yarn", "llama3")


def _unlike_llama(sub_block: SubBlock) -> str | None:
    """What of a sub-block Llama's words do not say; None where they say all of it."""
    if isinstance(sub_block, NoOp):
        return None
    if not isinstance(sub_block, Gqa | SwiGLU | Linear):
        return f"sub-blocks of kind '{sub_block.kind}'"
    assert isinstance(sub_block, Normed)
    if sub_block.norm != "before":
        return {"after": "norms after sub-blocks", "both": "norms before and after sub-blocks"}[sub_block.norm]
    if sub_block.norm_offset:
        return "norms whose scale is 1 + weight"
    if sub_block.residual_scale != 1:
        return f"factor {sub_block.residual_scale} on what a sub-block adds"
    if isinstance(sub_block, SwiGLU) and sub_block.activation != "silu":
        return f"activation '{sub_block.activation}' of FFNs"
    if isinstance(sub_block, Gqa):
        if sub_block.qk_norm is not None:
            return "per-head norms of q and k (Qwen3)" if sub_block.qk_norm == "head" else "norms of q and k (OLMo-2)"
        if sub_block.rope != "default":
            return "attention without positions" if sub_block.rope is None else "RoPE that differs between layers"
        if sub_block.scale is not None:
            return f"scale of its own for the scores ({sub_block.scale:g})"
        if sub_block.sinks:
            return "attention sinks (gpt-oss)"
    return None


def _others(engine: Engine, able: Callable[[Engine], bool]) -> str:
    """ "--engine a, b or c" that can, and hf, which always can."""
    names = [other.name for other in ENGINES.values() if other.name != engine.name and able(other)]
    listed = " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    return f"`engine` {listed}, or `format` hf" if listed else "`format` hf"


def _attention(child: Child, engine: Engine, reader: str, format: str) -> None:
    first = next((layer.origin for layer in child.layers if isinstance(layer.attention, Gqa)), None)
    if first is None:
        return
    attends = child.attention
    natural = child.hidden_size / attends.num_attention_heads
    if attends.head_dim != natural and (
        not engine.any_head_dim or (engine.name, format) == ("llama.cpp", "nemotron-nas")
    ):
        other = "`format` gguf" if engine.name == "llama.cpp" else _others(engine, lambda other: other.any_head_dim)
        raise UserError(
            f"layer {first} attention: {reader} takes head_dim = hidden_size / num_attention_heads = {natural:g} alone, "
            f"in {format}, and this child's is {attends.head_dim}: use {other}"
        )
    if engine.attention_bias == "none" and (attends.qkv_bias or attends.o_bias):
        raise UserError(
            f"layer {first} attention: {reader} reads no biases of q, k, v and o in {format}: "
            f"use {_others(engine, lambda other: other.attention_bias != 'none')}"
        )


def _windows(child: Child, engine: Engine, reader: str) -> None:
    size: int | None = None
    for layer in child.layers:
        shape = layer.attention
        if not isinstance(shape, Gqa) or (window := child.reach(shape)) is None:
            continue
        where = f"layer {layer.origin} attention: {reader}"
        if engine.windows == "none":
            others = _others(engine, lambda other: other.windows != "none")
            raise UserError(
                f"{where} takes no sliding window (this one's is {window}): the nearest choice is full attention "
                f"with {shape.num_key_value_heads} KV heads (solve without windows), or use {others}"
            )
        if size is not None and window != size:
            raise UserError(
                f"{where} takes windows of one size, and this one's is {window} after one of {size}: the nearest "
                f"choice is window-{size} (solve with one window), or use `format` hf"
            )
        size = window


def _ffn(child: Child, engine: Engine, reader: str) -> None:
    others = _others(engine, lambda other: other.ffn_bias)
    for layer in child.layers:
        if isinstance(layer.attention, Linear) and not (
            engine.linear_attention or engine.linear_ffn or engine.ffn_bias
        ):
            raise UserError(
                f"layer {layer.origin} attention: {reader} takes no linear attention, nor the biases that stand in for "
                f"it: the nearest choice is attention 'none' or 'kv1', or use {others}"
            )
        if isinstance(layer.ffn, Linear) and not (engine.linear_ffn or engine.ffn_bias):
            raise UserError(
                f"layer {layer.origin} ffn: {reader} takes no linear FFN, nor the biases that stand in for it: the "
                f"nearest choice is a narrow SwiGLU or 'none', or use {others}"
            )
        if isinstance(layer.ffn, SwiGLU) and layer.ffn.bias and not engine.ffn_bias:
            raise UserError(f"layer {layer.origin} ffn: {reader} reads no biases of FFNs: use {others}")
