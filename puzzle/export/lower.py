"""Exact rewrites of a child for an engine that cannot take a sub-block.

Each lowering is a function child -> child that computes the same logits; `lower` applies those that an engine needs, in this
order, and says which layers they touched and what they cost. `lowered` tells the same of sizes alone, so that `solve` prices what
the export will hold: no tensor is read, and torch is imported only when one is. Letters: E hidden_size, H query heads, K KV heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child, ChildLayer, Read, Tensors, empty_child, no_tensors
from puzzle.export.engines import ANY_DECILM_READER, HYBRIDS, STOCK, Engine, engine_named
from puzzle.export.refuse import is_nemotron_h, refuse
from puzzle.parents.nemotron_nas import WIDTH_STEP
from puzzle.parents.structure import Layer, Structure

if TYPE_CHECKING:
    from torch import Tensor

GATE = 64.0  # silu(64) = 64 in every dtype up to float64, so that a gate of bias 64 multiplies by 64 exactly
# A correction bias of an expert that no token is to choose: finite, since some kernels mark chosen ones with -inf.
NEVER = -1e30

Rewritten = tuple[Child, list[int]]  # the child, and the layers (before any lowering) that were touched


@dataclass(frozen=True, kw_only=True, slots=True)
class Lowering:
    """What one rewrite did. layers: of the child before any lowering; costs are of the whole child, 0 when free.
    kv_bytes_before: per token, of the child before this one."""

    name: str
    layers: tuple[int, ...]
    what: str
    num_parameters: int
    kv_bytes_per_token: int
    kv_bytes_before: int

    def __str__(self) -> str:
        costs = [f"{self.num_parameters:+,} parameters"] if self.num_parameters else []
        if self.kv_bytes_per_token:
            after = self.kv_bytes_before + self.kv_bytes_per_token
            costs.append(f"KV cache {self.kv_bytes_before:,} to {after:,} bytes per token")
        plural = "s" if len(self.layers) > 1 else ""
        where = f"layer{plural} {', '.join(map(str, self.layers))}"
        return f"{self.name}: {where}: {self.what} ({', '.join(costs) or 'costs nothing'})"


def lower(
    child: Child, engine: str | None, format: str, *, kv_bytes: int | None = None
) -> tuple[Child, list[Lowering]]:
    """The child as `engine` takes it in `format`, and what that took. engine None: any reader of the format. kv_bytes: of an element
    of the cache; None: as the weights have.

    Raises UserError, naming layer, sub-block and engine, for a shape that has no exact rewrite.
    """
    if engine is None and format in ("hf", *HYBRIDS):
        return child, []
    target = ANY_DECILM_READER if engine is None else engine_named(engine)
    # These say themselves what they have no words for.
    if format not in (*STOCK, *HYBRIDS) and not (format == "gguf" and is_nemotron_h(child)):
        refuse(child, target, format)
    done: list[Lowering] = []
    for name, what, rewrite in _plan(target, format, child):
        before = child
        child, layers = rewrite(before)
        if layers:
            element = kv_bytes or child.dtype.itemsize
            held, holds = before.kv_elements_per_token, child.kv_elements_per_token
            done.append(
                Lowering(
                    name=name,
                    layers=tuple(dict.fromkeys(layers)),
                    what=what,
                    num_parameters=child.num_parameters - before.num_parameters,
                    kv_bytes_per_token=(holds - held) * element,
                    kv_bytes_before=held * element,
                )
            )
    return child, done


def _plan(engine: Engine, format: str, child: Child) -> list[tuple[str, str, Callable[[Child], Rewritten]]]:
    """(name, what it does, rewrite) of the lowerings that an engine needs, in order."""
    if format in STOCK:
        return [("drop-empty-layers", "neither attention nor FFN: left out", drop_empty_layers)]
    if format == "gguf" and is_nemotron_h(child):
        return [
            (
                "some-attention",
                "no attention anywhere, which llama.cpp does not expect: one with a zero output",
                some_attention,
            ),
            ("some-mamba", "no Mamba-2 anywhere, which llama.cpp does not expect: one of zeros", some_mamba),
            ("zero-conv-bias", "Mamba-2's convolution gets a zero bias", zero_conv_bias),
            (
                "equal-experts",
                "experts of zeros that no token chooses, so that all mixtures have as many",
                equal_experts,
            ),
            ("equal-shared-experts", "shared experts padded with zero channels, so that all are as wide", equal_shared),
        ]
    equal_kv = (
        engine.equal_kv_heads,
        "equal-kv-heads",
        "KV heads repeated, so that all layers have as many",
        equal_kv_heads,
    )
    stock, first = engine is not ANY_DECILM_READER, engine.first_layer
    rows: list[tuple[bool, str, str, Callable[[Child], Rewritten]]] = [
        (stock, "drop-empty-layers", "neither attention nor FFN: left out", drop_empty_layers),
        (not engine.linear_attention, "linear-attention-as-ffn",
         "linear attention becomes the linear FFN of a layer put before", linear_attention_as_ffn),
        (not engine.linear_ffn, "linear-ffn-as-swiglu",
         "linear FFN becomes a SwiGLU with a constant gate, one matrix 3 times its size; every FFN gets biases", linear_ffn_as_swiglu),
        (True, "low-rank-as-matrix", "two matrices of low rank multiplied to one", low_rank_as_matrix),
        (first == "linear attention", "zero-linear-attention",
         "no attention in the first layer: zero linear attention", zero_linear_attention),
        (first == "softmax attention", "zero-attention",
         "no attention in the first layer: attention with one KV head and a zero output", zero_attention),
        (stock, "some-attention",
         "no softmax attention anywhere, which engines do not expect: one with a zero output", some_attention),
        (engine.ffn_required, "zero-ffn", f"no FFN: a zero FFN of width {WIDTH_STEP}", zero_ffn),
        (engine.attention_bias == "joint", "zero-output-bias",
         "biases on q, k and v alone: zero biases on o", zero_output_bias),
        equal_kv,
        (format == "nemotron-nas" and not engine.any_width, "zero-padded-ffn",
         f"FFN padded with zero channels to a multiple of {WIDTH_STEP}", pad_widths),
    ]  # fmt: skip
    rows = [equal_kv] if format in HYBRIDS else rows
    return [(name, what, rewrite) for needed, name, what, rewrite in rows if needed]


def lowered(layer: Layer, structure: Structure, base: Layer, engine: str, *, first: bool) -> list[SubBlock]:
    """Every sub-block that a layer becomes in an engine's export.

    structure, base: of the parent. first: layer 0, which some engines want to attend; an empty layer 0 counts as if the next one
    took its place without attention, which is the dearer case. Beside the layer stands one of the parent's, which keeps its
    attention: what an engine wants of all layers together (as many KV heads) is priced as if some layer stayed whole.
    """
    own, layers = (0, [layer, base]) if first else (1, [base, layer])
    child = empty_child(structure.with_layers(layers), base, "child")
    target = engine_named(engine)
    for name, _, rewrite in _plan(target, target.formats[0], child):
        if name != "some-mamba" and not (first and name == "drop-empty-layers"):  # Mamba-2 stands in another layer
            child, _ = rewrite(child)
    return [b for one in child.layers if one.origin == own for b in one.slots.values() if not isinstance(b, NoOp)]


def _each(child: Child, change: Callable[[ChildLayer], ChildLayer]) -> Rewritten:
    layers = tuple(change(layer) for layer in child.layers)
    touched = [layer.origin for layer, old in zip(layers, child.layers, strict=True) if layer is not old]
    return replace(child, layers=layers), touched


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
            rest = layer.put("attention", NO_OP)
            kept = frozenset({"ffn"} if "attention" in layer.bf16 else ())
            layers.append(replace(rest.put("ffn", layer.attention, layer.reads["attention"]), bf16=kept))
            layer = rest
            if layer.is_empty:
                continue
        layers.append(layer)
    return replace(child, layers=tuple(layers)), touched


def linear_ffn_as_swiglu(child: Child) -> Rewritten:
    """M·n = M·(silu(64) · n/64): gate weight 0 and bias 64, up I/64, down M; width E. Of low rank R: up V/64, down U; width R.

    All SwiGLUs of a child have biases or none: the others get zero biases.
    """
    touched = [layer.origin for layer in child.layers if isinstance(layer.ffn, Linear)]
    if not touched:
        return child, []
    size = child.hidden_size

    def gated(read: Read) -> Tensors:
        import torch

        found = read()
        if "linear.u.weight" in found:
            up, down = found.pop("linear.v.weight"), found.pop("linear.u.weight")
        else:
            down = found.pop("linear.weight")
            up = torch.eye(size, dtype=down.dtype)
        return found | {
            "up_proj.weight": up / GATE,
            "down_proj.weight": down,
            "gate_proj.bias": down.new_full((len(up),), GATE),
        }

    def change(layer: ChildLayer) -> ChildLayer:
        ffn = layer.ffn
        if isinstance(ffn, Linear):
            shape = SwiGLU(**ffn.norm_fields(), intermediate_size=ffn.rank or size, bias=True)
            return layer.put("ffn", shape, _filled(child, shape, partial(gated, layer.reads["ffn"])))
        return _resized(child, layer, "ffn", replace(ffn, bias=True)) if isinstance(ffn, SwiGLU) else layer

    changed, _ = _each(child, change)
    return replace(changed, base={**child.base, "ffn": replace(child.ffn, bias=True)}), touched


def low_rank_as_matrix(child: Child) -> Rewritten:
    """U V as one matrix [E, E], multiplied in float32 or finer and rounded once."""

    def multiplied(read: Read) -> Tensors:
        import torch

        found = read()
        u, v = found.pop("linear.u.weight"), found.pop("linear.v.weight")
        wide = torch.promote_types(u.dtype, torch.float32)
        return found | {"linear.weight": (u.to(wide) @ v.to(wide)).to(u.dtype)}

    def change(layer: ChildLayer) -> ChildLayer:
        for slot, own in layer.slots.items():
            if isinstance(own, Linear) and own.rank is not None:
                layer = layer.put(slot, replace(own, rank=None), partial(multiplied, layer.reads[slot]))
        return layer

    return _each(child, change)


def zero_linear_attention(child: Child) -> Rewritten:
    """A first layer without attention gets a zero matrix for it."""
    return _zeros(child, "attention", Linear(**child.attention.norm_fields()), [0])


def zero_attention(child: Child) -> Rewritten:
    """A first layer without attention gets one whose output projection, like everything in it, is zero."""
    return _zeros(child, "attention", replace(child.attention, num_key_value_heads=1, window=None), [0])


def some_attention(child: Child) -> Rewritten:
    """A child without softmax attention gets a zero one in a layer that has none, or in a new last layer."""
    return _some(child, replace(child.attention, num_key_value_heads=1, window=None))


def some_mamba(child: Child) -> Rewritten:
    """The same of Mamba-2, of one channel."""
    sizes = dict.fromkeys(("num_heads", "head_dim", "num_groups", "state_size"), 1)
    return _some(child, Mamba2(**child.attention.norm_fields(), **sizes))


def _some(child: Child, wanted: SubBlock) -> Rewritten:
    if any(layer.attention.kind == wanted.kind for layer in child.layers):
        return child, []
    without = [number for number, layer in enumerate(child.layers) if isinstance(layer.attention, NoOp)]
    if not without:
        without = [len(child.layers)]
        child = replace(child, layers=(*child.layers, child.layers[-1].put("attention", NO_OP).put("ffn", NO_OP)))
    return _zeros(child, "attention", wanted, without[:1])


def zero_ffn(child: Child) -> Rewritten:
    """Layers without FFN get a zero one."""
    return _zeros(child, "ffn", replace(child.ffn, intermediate_size=WIDTH_STEP), range(len(child.layers)))


def zero_output_bias(child: Child) -> Rewritten:
    """Where q, k and v have biases but o has none: zero biases on o."""
    changed, touched = _each_resized(child, "attention", Gqa, lambda b: replace(b, o_bias=True) if b.qkv_bias else b)
    if not touched:
        return child, []
    return replace(changed, base={**child.base, "attention": replace(child.attention, o_bias=True)}), touched


def equal_kv_heads(child: Child) -> Rewritten:
    """Each layer's KV heads repeated to the least common multiple: query head h reads KV head h // (H/K) as before."""
    most = math.lcm(*child.kv_heads)

    def repeated(read: Read, times: int, head_dim: int) -> Tensors:
        found = read()
        for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
            if name in found:
                heads = found[name].unflatten(0, (-1, head_dim))
                found[name] = heads.repeat_interleave(times, dim=0).flatten(0, 1)
        return found

    def change(layer: ChildLayer) -> ChildLayer:
        shape = layer.attention
        if not isinstance(shape, Gqa) or shape.num_key_value_heads == most:
            return layer
        times = most // shape.num_key_value_heads
        read = partial(repeated, layer.reads["attention"], times, shape.head_dim)
        return layer.put("attention", replace(shape, num_key_value_heads=most), read)

    return _each(child, change)


def zero_conv_bias(child: Child) -> Rewritten:
    return _each_resized(child, "attention", Mamba2, lambda b: replace(b, conv_bias=True))


def equal_experts(child: Child) -> Rewritten:
    """Experts of zeros at the end of every group, whose correction bias lets none of them be chosen."""
    mixtures = [layer.ffn for layer in child.layers if isinstance(layer.ffn, Moe)]
    if len({moe.num_groups for moe in mixtures}) != 1:  # groups that differ are refused
        return child, []
    each = max(moe.num_experts // moe.num_groups for moe in mixtures)

    def padded(read: Read, moe: Moe) -> Tensors:
        import torch

        found = read()
        for name in [n for n in found if n.startswith(("gate.", "experts."))]:
            groups = found[name].unflatten(0, (moe.num_groups, -1))
            value = NEVER if name == "gate.e_score_correction_bias" else 0.0
            rest = groups.new_full((moe.num_groups, each - groups.shape[1], *groups.shape[2:]), value)
            found[name] = torch.cat((groups, rest), dim=1).flatten(0, 1)
        return found

    def change(layer: ChildLayer) -> ChildLayer:
        moe = layer.ffn
        if not isinstance(moe, Moe) or moe.num_experts == each * moe.num_groups or not moe.correction_bias:
            return layer
        read = partial(padded, layer.reads["ffn"], moe)
        return layer.put("ffn", replace(moe, num_experts=each * moe.num_groups), read)

    return _each(child, change)


def equal_shared(child: Child) -> Rewritten:
    """Shared experts as wide as the widest, with channels of zero weights."""
    most = max((moe.shared_intermediate_size or 0 for x in child.layers if isinstance(moe := x.ffn, Moe)), default=0)

    def widened(moe: Moe) -> Moe:
        return moe if moe.shared_intermediate_size is None else replace(moe, shared_intermediate_size=most)

    return _each_resized(child, "ffn", Moe, widened)


def pad_widths(child: Child, step: int = WIDTH_STEP) -> Rewritten:
    """FFN widths rounded up to a multiple of `step` with channels of zero weights, which contribute nothing."""
    return _each_resized(
        child, "ffn", SwiGLU, lambda b: replace(b, intermediate_size=-(-b.intermediate_size // step) * step)
    )


def _zeros(child: Child, slot: str, shape: SubBlock, among: Sequence[int]) -> Rewritten:
    """Those of the layers `among` that have nothing in a slot get a sub-block of zeros there."""
    layers, zeros = list(child.layers), _filled(child, shape, no_tensors)
    empty = [number for number in among if isinstance(layers[number].slots.get(slot, NO_OP), NoOp)]
    for number in empty:
        layers[number] = layers[number].put(slot, shape, zeros)
    return replace(child, layers=tuple(layers)), [layers[number].origin for number in empty]


def _each_resized(child: Child, slot: str, kind: type[Any], shape: Callable[[Any], SubBlock]) -> Rewritten:
    """Every sub-block of a kind with zeros up to what `shape` makes of it."""

    def change(layer: ChildLayer) -> ChildLayer:
        own = layer.slots.get(slot)
        return _resized(child, layer, slot, shape(own)) if isinstance(own, kind) else layer

    return _each(child, change)


def _resized(child: Child, layer: ChildLayer, slot: str, shape: SubBlock) -> ChildLayer:
    """The layer with zeros around and beside what a sub-block has, up to `shape`; the same layer where it has that shape."""
    return layer if layer.slots[slot] == shape else layer.put(slot, shape, _filled(child, shape, layer.reads[slot]))


def _filled(child: Child, sub_block: SubBlock, read: Read) -> Read:
    """Reads a sub-block: what `read` has, with zeros (ones for norms) around it and for what it lacks."""

    def fill(name: str, dims: tuple[int, ...], found: Tensor | None) -> Tensor:
        import torch

        if found is not None and found.shape == dims:
            return found
        whole = torch.full(dims, 1.0 if "norm" in name else 0.0, dtype=child.dtype if found is None else found.dtype)
        if found is not None:
            whole[tuple(slice(size) for size in found.shape)] = found
        return whole

    def tensors() -> Tensors:
        found = read()
        return {name: fill(name, dims, found.pop(name, None)) for name, dims in sub_block.tensors().items()}

    return tensors
