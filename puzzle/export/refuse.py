"""What of a child an engine cannot take and no exact rewrite helps: said before anything is written."""

from __future__ import annotations

from collections.abc import Callable

from puzzle.base.errors import UserError
from puzzle.export.child import Child, Gqa, Linear, SwiGlu
from puzzle.export.engines import ANY_DECILM_READER, ENGINES, Engine


def refuse(child: Child, engine: Engine, format: str) -> None:
    """Raise UserError, naming layer, sub-block, engine and the nearest choice that works, or return."""
    reader = "a reader of nemotron-nas" if engine is ANY_DECILM_READER else engine.name
    _attention(child, engine, reader, format)
    _windows(child, engine, reader)
    _ffn(child, engine, reader)


def _others(engine: Engine, able: Callable[[Engine], bool]) -> str:
    """ "--engine a, b or c" that can, and hf, which always can."""
    names = [other.name for other in ENGINES.values() if other is not engine and able(other)]
    listed = " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    return f"--engine {listed}, or --format hf" if listed else "--format hf"


def _attention(child: Child, engine: Engine, reader: str, format: str) -> None:
    first = next((layer.origin for layer in child.layers if isinstance(layer.attention, Gqa)), None)
    if first is None:
        return
    if child.qk_norm:
        raise UserError(
            f"layer {first} attention: {reader} has no per-head norms of q and k (Qwen3) in {format}: "
            "write --format hf, which transformers reads"
        )
    natural = child.hidden_size / child.num_attention_heads
    if child.head_dim != natural and (
        not engine.any_head_dim or (engine.name, format) == ("llama.cpp", "nemotron-nas")
    ):
        other = "--format gguf" if engine.name == "llama.cpp" else _others(engine, lambda other: other.any_head_dim)
        raise UserError(
            f"layer {first} attention: {reader} takes head_dim = hidden_size / num_attention_heads = {natural:g} alone, "
            f"in {format}, and this child's is {child.head_dim}: use {other}"
        )
    if engine.attention_bias == "none" and (child.qkv_bias or child.o_bias):
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
                f"choice is window-{size} (solve with one window), or use --format hf"
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
        if isinstance(layer.ffn, SwiGlu) and child.mlp_bias and not engine.ffn_bias:
            raise UserError(f"layer {layer.origin} ffn: {reader} reads no biases of FFNs: use {others}")
