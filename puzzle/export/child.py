"""One description of a child that every writer reads, whatever the format: facts, shapes per layer, tensors on demand.

`puzzle.export.sources` makes one of a library and an architecture, or of a checkpoint on disk. `puzzle.export.lower` rewrites it for an engine, and
the writers (`hf`, `nemotron_nas`, `gguf`) put it on disk. Nothing is read before a `read_…` callable is called, so that
a child larger than the memory streams through, one sub-block at a time.

Twelve tiny children with every kind of layer, for tests and for the matrix of engines: `benchmarks/lib/tiny_children.py`.
Letters: E hidden_size, H num_attention_heads, K num_key_value_heads, D head_dim, F width, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.layer import KINDS, Kind, LayerSpec, attention_shapes, ffn_shapes
from puzzle.parents.family import hf_name

Tensors = dict[str, Tensor]
Read = Callable[[], Tensors]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gqa:
    """Softmax attention with num_key_value_heads K, over the last `window` tokens (None: all).

    Tensors: norm.weight [E], q_proj.weight [H·D, E], k_proj.weight and v_proj.weight [K·D, E], o_proj.weight [E, H·D];
    with qkv_bias {q,k,v}_proj.bias; with o_bias o_proj.bias [E]; with qk_norm q_norm.weight and k_norm.weight [D].
    Rows of q and k stand in the rotate-half order of Llama checkpoints.
    """

    num_key_value_heads: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SwiGlu:
    """down(silu(gate(n)) · up(n)) of the normed input n, `width` F channels wide.

    Tensors: norm.weight [E], gate_proj.weight and up_proj.weight [F, E], down_proj.weight [E, F]; with mlp_bias
    {gate,up,down}_proj.bias.
    """

    width: int


@dataclass(frozen=True, slots=True)
class Linear:
    """One matrix after the norm, without bias, for attention or FFN. Tensors: norm.weight [E], linear.weight [E, E]."""


@dataclass(frozen=True, slots=True)
class Absent:
    """Nothing, not even a norm: adds nothing to the residual stream. No tensors."""


Attention = Gqa | Linear | Absent
Ffn = SwiGlu | Linear | Absent
LINEAR, ABSENT = Linear(), Absent()


def no_tensors() -> Tensors:
    """What reads a sub-block that is absent."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildLayer:
    """h = x + attention(x), then h + ffn(h). `read_…` return {name inside the sub-block: tensor}, as `Gqa` … list them.

    origin: the layer of the child, before any lowering, that this one stands for; messages name it.
    parent_layer: the last layer of the parent that this one stands for; None: that of its origin's number.
    """

    attention: Attention
    ffn: Ffn
    read_attention: Read
    read_ffn: Read
    origin: int
    parent_layer: int | None = None

    @property
    def stands_for(self) -> int:
        """The last layer of the parent that this one stands for: their outputs can be compared."""
        return self.origin if self.parent_layer is None else self.parent_layer

    def shape(self, kind: Kind) -> Attention | Ffn:
        return self.attention if kind == "attention" else self.ffn

    def read(self, kind: Kind) -> Tensors:
        return self.read_attention() if kind == "attention" else self.read_ffn()

    @property
    def is_empty(self) -> bool:
        return isinstance(self.attention, Absent) and isinstance(self.ffn, Absent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A whole child. rope_parameters as transformers has them: {"rope_type", "rope_theta", "factor", ...}.

    num_key_value_heads, intermediate_size and window are the parent's: the values of layers that nothing changed.
    qkv_bias, o_bias, mlp_bias and qk_norm hold for every softmax attention and every SwiGLU of the child.
    dtype: of the tensors that the `read_…` callables return.
    """

    name: str  # for messages and the card
    layers: tuple[ChildLayer, ...]
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    window: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    dtype: torch.dtype
    tokenizer: Path | None  # the directory with the tokenizer's files
    generation_config: dict[str, Any] | None
    parent_name: str
    licence: str | None  # as the parent's model card names it on the hub: "llama3.1", "apache-2.0"
    parent_config: dict[str, Any]  # config.json as it was read
    read_embedding: Callable[[], Tensor]  # [V, E]
    read_final_norm: Callable[[], Tensor]  # [E]
    read_head: Callable[[], Tensor]  # [V, E]; the embedding when tied

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor), sub-block after sub-block; a tied head is left out."""
        yield "model.embed_tokens.weight", self.read_embedding()
        for index, layer in enumerate(self.layers):
            for kind in KINDS:
                block = layer.read(kind)
                for name in sorted(block):  # in one order, wherever they were read
                    yield hf_name(index, kind, name), block.pop(name)
        yield "model.norm.weight", self.read_final_norm()
        if not self.tied:
            yield "lm_head.weight", self.read_head()

    def reach(self, shape: Gqa) -> int | None:
        """The window that an attention needs, None when it covers the child's whole context."""
        return None if shape.window is None or shape.window >= self.max_position_embeddings else shape.window

    def sub_block_shapes(self, index: int, kind: Kind) -> dict[str, tuple[int, ...]]:
        """{name inside the sub-block: shape} of one sub-block, without reading it."""
        return sub_block_shapes(self, self.layers[index].shape(kind))

    @property
    def num_parameters(self) -> int:
        """Of all tensors that `tensors` yields."""
        fixed = self.vocab_size * self.hidden_size * (1 if self.tied else 2) + self.hidden_size
        return fixed + sum(num_parameters(self, layer.shape(kind)) for layer in self.layers for kind in KINDS)

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values together, over all layers; windows not deducted."""
        heads = (layer.attention.num_key_value_heads for layer in self.layers if isinstance(layer.attention, Gqa))
        return 2 * self.head_dim * sum(heads)

    @property
    def layer_origins(self) -> list[int] | None:
        """Per layer, the last layer of the parent that it stands for; None when nothing ever changed their number."""
        if all(layer.parent_layer is None for layer in self.layers):
            return None
        return [layer.stands_for for layer in self.layers]

    def per_layer_config(self) -> dict[str, dict[str, Any]]:
        """The standard field of config.json: {layer: what it changes}, only layers that differ from the parent."""
        entries: dict[str, dict[str, Any]] = {}
        for index, layer in enumerate(self.layers):
            entry: dict[str, Any] = {}
            for kind, owner in zip(KINDS, ("attention", "mlp"), strict=True):
                shape = layer.shape(kind)
                if isinstance(shape, Gqa):
                    if shape.num_key_value_heads != self.num_key_value_heads:
                        entry["num_key_value_heads"] = shape.num_key_value_heads
                    if shape.window != self.window:
                        entry["sliding_window"] = shape.window
                elif isinstance(shape, SwiGlu):
                    if shape.width != self.intermediate_size:
                        entry["intermediate_size"] = shape.width
                else:
                    key = "linear" if isinstance(shape, Linear) else "skip"
                    entry[key] = [*entry.get(key, []), owner]
            if entry:
                entries[str(index)] = entry
        return entries


def sub_block_shapes(child: Child, shape: Attention | Ffn) -> dict[str, tuple[int, ...]]:
    """{name inside the sub-block: shape} of a sub-block of this child's sizes and biases."""
    size = child.hidden_size
    if isinstance(shape, Absent):
        return {}
    if isinstance(shape, Linear):
        return {"norm.weight": (size,), "linear.weight": (size, size)}
    spec = _spec(child)
    return (
        attention_shapes(spec, shape.num_key_value_heads) if isinstance(shape, Gqa) else ffn_shapes(spec, shape.width)
    )


def num_parameters(child: Child, shape: Attention | Ffn) -> int:
    """Elements of a sub-block's tensors, its norm included."""
    return sum(torch.Size(dims).numel() for dims in sub_block_shapes(child, shape).values())


def _spec(child: Child) -> LayerSpec:
    return LayerSpec(
        hidden_size=child.hidden_size,
        num_attention_heads=child.num_attention_heads,
        num_key_value_heads=child.num_key_value_heads,
        head_dim=child.head_dim,
        intermediate_size=child.intermediate_size,
        rms_norm_eps=child.rms_norm_eps,
        inv_freq=(),
        qkv_bias=child.qkv_bias,
        o_bias=child.o_bias,
        mlp_bias=child.mlp_bias,
        qk_norm=child.qk_norm,
        window=child.window,
    )


def with_dtype(child: Child, dtype: torch.dtype) -> Child:
    """The child with all tensors cast to `dtype` when they are read; reading raises UserError where one overflows."""

    def cast(tensor: Tensor) -> Tensor:
        found = tensor.to(dtype)
        if tensor.dtype != dtype and dtype == torch.float16 and not torch.isfinite(found).all():
            raise UserError(f"--dtype float16: a weight of {child.name} exceeds its range of 65504: use bfloat16")
        return found

    def cast_all(read: Read) -> Read:
        return lambda: {name: cast(tensor) for name, tensor in read().items()}

    layers = tuple(
        replace(layer, read_attention=cast_all(layer.read_attention), read_ffn=cast_all(layer.read_ffn))
        for layer in child.layers
    )
    embedding, final_norm, head = child.read_embedding, child.read_final_norm, child.read_head
    return replace(
        child,
        layers=layers,
        dtype=dtype,
        read_embedding=lambda: cast(embedding()),
        read_final_norm=lambda: cast(final_norm()),
        read_head=lambda: cast(head()),
    )
