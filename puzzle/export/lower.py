"""Exact rewrites of a child for an engine that cannot take a shape, and refusals where there is none.

Each lowering is a function child -> child that computes the same logits; `lower` applies those that an engine needs,
in this order, and says which layers they touched and what they cost. Letters as in `puzzle.export.child`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from puzzle.export.child import (
    ABSENT,
    LINEAR,
    Absent,
    Attention,
    Child,
    ChildLayer,
    Ffn,
    Gqa,
    Linear,
    Read,
    SwiGlu,
    Tensors,
    no_tensors,
    sub_block_shapes,
)
from puzzle.export.engines import ANY_DECILM_READER, ENGINES, Engine
from puzzle.export.refuse import refuse
from puzzle.parents.nemotron_nas import WIDTH_STEP

GATE = 64.0  # silu(64) = 64 in every dtype up to float64, so that a gate of bias 64 multiplies by 64 exactly

Rewritten = tuple[Child, list[int]]  # the child, and the layers (before any lowering) that were touched


@dataclass(frozen=True, kw_only=True, slots=True)
class Lowering:
    """What one rewrite did. layers: of the child before any lowering; costs are of the whole child, 0 when free."""

    name: str
    layers: tuple[int, ...]
    what: str
    num_parameters: int
    kv_bytes_per_token: int

    def __str__(self) -> str:
        costs = [f"{self.num_parameters:+,} parameters"] if self.num_parameters else []
        costs += [f"{self.kv_bytes_per_token:+,} bytes of KV cache per token"] if self.kv_bytes_per_token else []
        plural = "s" if len(self.layers) > 1 else ""
        where = f"layer{plural} {', '.join(map(str, self.layers))}"
        return f"{self.name}: {where}: {self.what} ({', '.join(costs) or 'costs nothing'})"


def lower(child: Child, engine: str | None, format: str) -> tuple[Child, list[Lowering]]:
    """The child as `engine` takes it in `format`, and what that took. engine None: any reader of the format.

    Raises UserError, naming layer, sub-block and engine, for a shape that has no exact rewrite.
    """
    if engine is None and format == "hf":
        return child, []
    target = ANY_DECILM_READER if engine is None else ENGINES[engine]
    refuse(child, target, format)
    done: list[Lowering] = []
    for name, what, rewrite in _plan(target, format):
        before = child
        child, layers = rewrite(before)
        if layers:
            extra_kv = child.kv_elements_per_token - before.kv_elements_per_token
            done.append(
                Lowering(
                    name=name,
                    layers=tuple(dict.fromkeys(layers)),
                    what=what,
                    num_parameters=child.num_parameters - before.num_parameters,
                    kv_bytes_per_token=extra_kv * child.dtype.itemsize,
                )
            )
    return child, done


def _plan(engine: Engine, format: str) -> list[tuple[str, str, Callable[[Child], Rewritten]]]:
    """(name, what it does, rewrite) of the lowerings that an engine needs, in order."""
    plan: list[tuple[str, str, Callable[[Child], Rewritten]]] = []
    if engine is not ANY_DECILM_READER:
        plan.append(("drop-empty-layers", "neither attention nor FFN: left out", drop_empty_layers))
    if not engine.linear_attention:
        text = "linear attention becomes the linear FFN of a layer put before"
        plan.append(("linear-attention-as-ffn", text, linear_attention_as_ffn))
    if not engine.linear_ffn:
        text = "linear FFN becomes a SwiGLU with a constant gate, 3 times its size; every FFN gets biases"
        plan.append(("linear-ffn-as-swiglu", text, linear_ffn_as_swiglu))
    if engine.first_layer == "linear attention":
        text = "no attention in the first layer: zero linear attention"
        plan.append(("zero-linear-attention", text, zero_linear_attention))
    if engine.first_layer == "softmax attention":
        text = "no attention in the first layer: attention with one KV head and a zero output"
        plan.append(("zero-attention", text, zero_attention))
    if engine is not ANY_DECILM_READER:
        text = "no softmax attention anywhere, which engines do not expect: one with a zero output"
        plan.append(("some-attention", text, some_attention))
    if engine.ffn_required:
        plan.append(("zero-ffn", f"no FFN: a zero FFN of width {WIDTH_STEP}", zero_ffn))
    if engine.attention_bias == "joint":
        plan.append(("zero-output-bias", "biases on q, k and v alone: zero biases on o", zero_output_bias))
    if engine.equal_kv_heads:
        plan.append(("equal-kv-heads", "KV heads repeated, so that all layers have as many", equal_kv_heads))
    if format == "nemotron-nas" and not engine.any_width:
        text = f"FFN padded with zero channels to a multiple of {WIDTH_STEP}"
        plan.append(("zero-padded-ffn", text, pad_widths))
    return plan


def _with_layers(child: Child, change: Callable[[ChildLayer], ChildLayer], **facts: Any) -> Rewritten:
    layers = tuple(change(layer) for layer in child.layers)
    touched = [layer.origin for layer, old in zip(layers, child.layers, strict=True) if layer is not old]
    return replace(child, layers=layers, **facts), touched


def drop_empty_layers(child: Child) -> Rewritten:
    """Layers with neither attention nor FFN left out; the first one stays when all are such."""
    kept = tuple(layer for layer in child.layers if not layer.is_empty) or child.layers[:1]
    dropped = {layer.origin for layer in child.layers} - {layer.origin for layer in kept}
    return replace(child, layers=kept), sorted(dropped)


def linear_attention_as_ffn(child: Child) -> Rewritten:
    """x + M·norm(x) is what a layer without attention does whose FFN is the matrix M: put it before, or in place."""
    layers: list[ChildLayer] = []
    touched = []
    for layer in child.layers:
        if isinstance(layer.attention, Linear):
            touched.append(layer.origin)
            as_ffn = replace(
                layer, attention=ABSENT, read_attention=no_tensors, ffn=LINEAR, read_ffn=layer.read_attention
            )
            layers.append(as_ffn)
            layer = replace(layer, attention=ABSENT, read_attention=no_tensors)
            if layer.is_empty:
                continue
        layers.append(layer)
    return replace(child, layers=tuple(layers)), touched


def linear_ffn_as_swiglu(child: Child) -> Rewritten:
    """M·n = M·(silu(64) · n/64): gate weight 0 and bias 64, up I/64, down M; width E.

    All SwiGLUs of a child have biases or none: the others get zero biases.
    """
    if not any(isinstance(layer.ffn, Linear) for layer in child.layers):
        return child, []
    size = child.hidden_size

    def from_matrix(read: Read) -> Read:
        def tensors() -> Tensors:
            found = read()
            matrix = found["linear.weight"]
            return {
                "norm.weight": found["norm.weight"],
                "gate_proj.weight": matrix.new_zeros(size, size),
                "up_proj.weight": torch.eye(size, dtype=matrix.dtype).div_(GATE),
                "down_proj.weight": matrix,
                "gate_proj.bias": matrix.new_full((size,), GATE),
                "up_proj.bias": matrix.new_zeros(size),
                "down_proj.bias": matrix.new_zeros(size),
            }

        return tensors

    biased = replace(child, mlp_bias=True)
    layers, touched = [], []
    for layer in child.layers:
        if isinstance(layer.ffn, Linear):
            touched.append(layer.origin)
            layer = replace(layer, ffn=SwiGlu(width=size), read_ffn=from_matrix(layer.read_ffn))
        elif isinstance(layer.ffn, SwiGlu) and not child.mlp_bias:
            layer = replace(layer, read_ffn=_filled(biased, layer.ffn, layer.read_ffn))
        layers.append(layer)
    return replace(biased, layers=tuple(layers)), touched


def zero_linear_attention(child: Child) -> Rewritten:
    """A first layer without attention gets a zero matrix for it."""
    return _first_attention(child, LINEAR)


def zero_attention(child: Child) -> Rewritten:
    """A first layer without attention gets one whose output projection, like everything in it, is zero."""
    return _first_attention(child, Gqa(num_key_value_heads=1))


def some_attention(child: Child) -> Rewritten:
    """A child without softmax attention gets a zero one in a layer that has none, or in a new last layer."""
    if any(isinstance(layer.attention, Gqa) for layer in child.layers):
        return child, []
    shape = Gqa(num_key_value_heads=1)
    zeros = _filled(child, shape, no_tensors)
    for number, layer in enumerate(child.layers):
        if isinstance(layer.attention, Absent):
            given = replace(layer, attention=shape, read_attention=zeros)
            return replace(child, layers=(*child.layers[:number], given, *child.layers[number + 1 :])), [layer.origin]
    last = child.layers[-1]
    given = replace(last, attention=shape, read_attention=zeros, ffn=ABSENT, read_ffn=no_tensors)
    return replace(child, layers=(*child.layers, given)), [last.origin]


def zero_ffn(child: Child) -> Rewritten:
    """Layers without FFN get a zero one."""
    shape = SwiGlu(width=WIDTH_STEP)
    zeros = _filled(child, shape, no_tensors)
    return _with_layers(
        child, lambda layer: replace(layer, ffn=shape, read_ffn=zeros) if isinstance(layer.ffn, Absent) else layer
    )


def zero_output_bias(child: Child) -> Rewritten:
    """Where q, k and v have biases but o has none: zero biases on o."""
    if child.o_bias or not child.qkv_bias:
        return child, []
    biased = replace(child, o_bias=True)

    def change(layer: ChildLayer) -> ChildLayer:
        if not isinstance(layer.attention, Gqa):
            return layer
        return replace(layer, read_attention=_filled(biased, layer.attention, layer.read_attention))

    return _with_layers(child, change, o_bias=True)


def equal_kv_heads(child: Child) -> Rewritten:
    """Each layer's KV heads repeated to the least common multiple: query head h reads KV head h // (H/K) as before."""
    counts = [layer.attention.num_key_value_heads for layer in child.layers if isinstance(layer.attention, Gqa)]
    most = math.lcm(*counts) if counts else 1

    def repeated(read: Read, times: int) -> Read:
        def tensors() -> Tensors:
            found = read()
            for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
                if name in found:
                    heads = found[name].unflatten(0, (-1, child.head_dim))
                    found[name] = heads.repeat_interleave(times, dim=0).flatten(0, 1)
            return found

        return tensors

    def change(layer: ChildLayer) -> ChildLayer:
        shape = layer.attention
        if not isinstance(shape, Gqa) or shape.num_key_value_heads == most:
            return layer
        times = most // shape.num_key_value_heads
        return replace(
            layer,
            attention=replace(shape, num_key_value_heads=most),
            read_attention=repeated(layer.read_attention, times),
        )

    return _with_layers(child, change)


def pad_widths(child: Child, step: int = WIDTH_STEP) -> Rewritten:
    """FFN widths rounded up to a multiple of `step` with channels of zero weights, which contribute nothing."""

    def change(layer: ChildLayer) -> ChildLayer:
        if not isinstance(layer.ffn, SwiGlu) or layer.ffn.width % step == 0:
            return layer
        shape = SwiGlu(width=-(-layer.ffn.width // step) * step)
        return replace(layer, ffn=shape, read_ffn=_filled(child, shape, layer.read_ffn))

    return _with_layers(child, change)


def _first_attention(child: Child, shape: Attention) -> Rewritten:
    first = child.layers[0]
    if not isinstance(first.attention, Absent):
        return child, []
    given = replace(first, attention=shape, read_attention=_filled(child, shape, no_tensors))
    return replace(child, layers=(given, *child.layers[1:])), [first.origin]


def _filled(child: Child, shape: Attention | Ffn, read: Read) -> Read:
    """Reads a sub-block of `shape`: what `read` has, with zeros (ones for norms) around it and for what it lacks."""
    wanted = sub_block_shapes(child, shape)

    def fill(name: str, dims: tuple[int, ...], found: Tensor | None) -> Tensor:
        if found is not None and found.shape == dims:
            return found
        whole = torch.full(dims, 1.0 if "norm" in name else 0.0, dtype=child.dtype if found is None else found.dtype)
        if found is not None:
            whole[tuple(slice(size) for size in found.shape)] = found
        return whole

    def tensors() -> Tensors:
        found = read()
        return {name: fill(name, dims, found.pop(name, None)) for name, dims in wanted.items()}

    return tensors
