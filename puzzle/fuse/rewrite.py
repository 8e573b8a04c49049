"""Fusion as a rewrite of a child: x + Σ_k FFN_k(norm_k(x)) as one layer with one wide SwiGLU.

For layers k of a run, with norm scales s_k, n = x / rms(x), and ⊙ the product of channels:
    Σ_k D_k (silu(G_k (s_k ⊙ n)) ⊙ U_k (s_k ⊙ n)) = D (silu(G n) ⊙ U n)
with G and U the rows of G_k·diag(s_k) and U_k·diag(s_k) under each other, D the columns of D_k beside each other, and a
norm of scale one. So every FFN keeps its own norm ("own"). The paper keeps the last layer's norm for all FFNs ("last",
arXiv 2503.18908, section 3): then G_k and U_k stay as they are and the scale is s_j. Biases of gate and up stack, those
of down add up. What fusion changes is the input: an FFN no longer sees what the FFNs before it in its run added.

Nothing is read before the fused layer is; then one layer of the run, and its folded copy, are held beside it.
Letters: E hidden_size, F width of one FFN, W width of the fused one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child, ChildLayer, Read, Tensors, no_tensors
from puzzle.fuse.runs import Run, check_runs, members, width_of

Norm = Literal["own", "last"]


def widths_of(child: Child) -> list[int | None]:
    """Per layer, as `puzzle.fuse.runs` has it: channels of a layer without attention, 0 for no FFN, None: not fusible."""
    return [
        None if _reason(layer) else layer.ffn.intermediate_size if isinstance(layer.ffn, SwiGLU) else 0
        for layer in child.layers
    ]


def _reason(layer: ChildLayer) -> str:
    """What stands in the way of fusing a layer; "" where nothing does."""
    others = [sub_block for slot, sub_block in layer.slots.items() if slot != "ffn" and not isinstance(sub_block, NoOp)]
    if others:
        return f"has {'linear ' if isinstance(others[0], Linear) else ''}attention"
    ffn = layer.ffn
    if isinstance(ffn, NoOp):
        return ""
    if isinstance(ffn, Linear):
        return "has a linear FFN, which no wide SwiGLU can hold"
    if not isinstance(ffn, SwiGLU):
        return f"has an FFN of kind '{ffn.kind}', which no wide SwiGLU can hold"
    return "" if ffn.norm == "before" else "has a norm after its FFN, which keeps FFNs from adding up"


def _wide(layers: Sequence[ChildLayer], width: int) -> SwiGLU:
    """One FFN of all their channels. Raises UserError where they differ in more than their width."""
    kinds = {replace(layer.ffn, intermediate_size=width) for layer in layers if isinstance(layer.ffn, SwiGLU)}
    if len(kinds) > 1:
        told = " and ".join(f"'{kind.key()}'" for kind in kinds)
        raise UserError(
            f"layers {layers[0].origin}-{layers[-1].origin} have FFNs of different kinds, {told}: fuse fewer"
        )
    return kinds.pop()


def fuse_layers(child: Child, runs: Sequence[Run], norm: Norm = "own") -> Child:
    """The child with each run as one layer without attention; layers of a run without FFN vanish.

    Each new layer stands for the last parent layer of its run (`ChildLayer.parent_layer`). Raises UserError as
    `check_runs` does.
    """
    widths = widths_of(child)
    starts = {run[0]: run for run in check_runs(runs, widths, [_reason(layer) for layer in child.layers])}
    layers: list[ChildLayer] = []
    at = 0
    while at < len(child.layers):
        if at not in starts:
            layers.append(child.layers[at])
            at += 1
            continue
        run = starts[at]
        parts = [child.layers[index] for index in members(run, widths)]
        last = child.layers[run[1]]
        wide = _wide(parts, width_of(run, widths))
        empty = dict.fromkeys(last.slots, NO_OP)
        merged = replace(last, slots=empty, reads=dict.fromkeys(empty, no_tensors))
        layers.append(merged.put("ffn", wide, _stacked([part.reads["ffn"] for part in parts], wide, norm)))
        at = run[1] + 1
    return _numbered(child, layers)


def remove_layers(child: Child, layers: Sequence[int]) -> Child:
    """The child without these layers: what fusion is held against, at the same number of layers."""
    return _numbered(child, [layer for index, layer in enumerate(child.layers) if index not in set(layers)])


def _numbered(child: Child, layers: Sequence[ChildLayer]) -> Child:
    """The child with these layers in place of its own, each of which still stands for the same layer of the parent."""
    numbered = tuple(replace(layer, origin=index, parent_layer=layer.stands_for) for index, layer in enumerate(layers))
    return replace(child, layers=numbered)


def _stacked(reads: list[Read], wide: SwiGLU, norm: Norm) -> Read:
    """Reads FFNs one by one into the tensors of the wide one, in the widest of their dtypes."""

    def tensors() -> Tensors:
        found: Tensors = {}
        begin = 0
        for read in reads:
            part = folded(read(), wide.norm_offset) if norm == "own" else read()
            width = len(part["up_proj.weight"])
            for name, value in part.items():
                so_far = found[name] if name in found else value.new_zeros(wide.tensors()[name])
                found[name] = so_far.to(torch.promote_types(so_far.dtype, value.dtype))
                if name == "norm.weight":
                    found[name].copy_(value)  # with folded scales all are one; otherwise the last one stays
                elif name == "down_proj.bias":
                    found[name].add_(value)
                else:
                    found[name].narrow(1 if name == "down_proj.weight" else 0, begin, width).copy_(value)
            begin += width
        return found

    return tensors


def folded(tensors: Tensors, offset: bool = False) -> Tensors:
    """An FFN's tensors with the scale of its norm inside gate and up [F, E], and a norm of ones [E].

    The product is taken in float32 (in float64 for float64 weights) and rounded once. offset: the scale is 1 + weight.
    """
    scale = tensors["norm.weight"]
    found = dict(tensors)
    for name in ("gate_proj.weight", "up_proj.weight"):
        weight = tensors[name]
        precise = torch.promote_types(torch.promote_types(weight.dtype, scale.dtype), torch.float32)
        found[name] = (weight.to(precise) * (scale.to(precise) + offset)).to(weight.dtype)
    found["norm.weight"] = torch.zeros_like(scale) if offset else torch.ones_like(scale)
    return found
