"""One description of a child that every writer reads, whatever the format: sub-blocks per layer, tensors on demand.

`puzzle.export.sources` makes one of a library and an architecture, or of a checkpoint on disk. `puzzle.export.lower` rewrites it
for an engine, and the writers (`hf`, `nemotron_nas`, `gguf`) put it on disk. Nothing is read before a read is called, so that
a child larger than the memory streams through, one sub-block at a time. Needs no torch: `solve` prices with the same rewrites.

Twelve tiny children with every kind of layer, for tests and for the matrix of engines: `benchmarks/lib/tiny_children.py`.
Letters: H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle.base.errors import UserError
from puzzle.blocklib.ffn import Ffn
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.names import EMBEDDING, FINAL_NORM, HEAD, hf_name
from puzzle.parents.structure import Layer, Structure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Read = Callable[[], Tensors]  # {name inside the sub-block: tensor}, those that `sub_block.tensors()` lists


def no_tensors() -> Tensors:
    """What reads a sub-block that is absent."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildLayer:
    """slots: the sub-blocks in the order of the residual stream; reads: their tensors.

    origin: the layer of the child, before any lowering, that this one stands for; messages name it.
    parent_layer: the last layer of the parent that this one stands for; None: that of its origin's number.
    bf16: the slots that stay in bf16 where the child is written in fp8.
    """

    slots: Layer
    reads: Mapping[str, Read]
    origin: int
    parent_layer: int | None = None
    bf16: frozenset[str] = frozenset()

    @property
    def in_bf16(self) -> list[str]:
        """The slots with matrices that stay in bf16."""
        return [slot for slot in self.slots if slot in self.bf16 and self.slots[slot].num_matrix_parameters]

    @property
    def attention(self) -> SubBlock:
        return self.slots.get("attention", NO_OP)

    @property
    def ffn(self) -> SubBlock:
        return self.slots.get("ffn", NO_OP)

    @property
    def stands_for(self) -> int:
        """The last layer of the parent that this one stands for: their outputs can be compared."""
        return self.origin if self.parent_layer is None else self.parent_layer

    def read(self, slot: str) -> Tensors:
        return self.reads[slot]()

    def put(self, slot: str, sub_block: SubBlock, read: Read = no_tensors) -> ChildLayer:
        """The layer with another sub-block in a slot."""
        return replace(self, slots={**self.slots, slot: sub_block}, reads={**self.reads, slot: read})

    @property
    def is_empty(self) -> bool:
        return all(isinstance(sub_block, NoOp) for sub_block in self.slots.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A whole child. around: what stands around its layers, with no layers. base: what its config's global values describe.

    dtype: of the tensors that the reads return, or, where the source is in fp8, what `tensors` makes of the float32 that they do.
    """

    name: str  # for messages and the card
    layers: tuple[ChildLayer, ...]
    around: Structure
    base: Layer
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    dtype: torch.dtype
    tokenizer: Path | None  # the directory with the tokenizer's files
    generation_config: dict[str, Any] | None
    parent_name: str
    licence: str | None  # as the parent's model card names it on the hub: "llama3.1", "apache-2.0"
    read_embedding: Callable[[], Tensor]  # [V, H]
    read_final_norm: Callable[[], Tensor]  # [H]
    read_head: Callable[[], Tensor]  # [V, H]; the embedding when tied
    dequantised: bool = False  # reads may give float32 for what was stored in fp8
    kept: Mapping[str, Any] = field(default_factory=dict)  # fields of the parent's config.json that a child's may keep

    @property
    def structure(self) -> Structure:
        return self.around.with_layers([layer.slots for layer in self.layers])

    @property
    def sub_blocks(self) -> Iterator[SubBlock]:
        """Of all slots, in order."""
        return (sub_block for layer in self.layers for sub_block in layer.slots.values())

    @property
    def dtype_name(self) -> str:
        """As config.json and `dtype` call it: "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def hidden_size(self) -> int:
        return self.around.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.around.vocab_size

    @property
    def tied(self) -> bool:
        return self.around.tied

    @property
    def max_length(self) -> int:
        """max_position_embeddings"""
        return self.around.max_length

    @property
    def attention(self) -> Gqa:
        """The attention that the config's global values describe. Raises UserError where they describe none."""
        return _of_kind(self, "attention", Gqa)

    @property
    def ffn(self) -> Ffn:
        """The FFN that they describe."""
        return _of_kind(self, "ffn", Ffn)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor), sub-block after sub-block; a tied head is left out."""
        if self.dequantised:
            yield from with_dtype(self, self.dtype).tensors()
            return
        yield EMBEDDING, self.read_embedding()
        for index, layer in enumerate(self.layers):
            for slot, sub_block in layer.slots.items():
                block = layer.read(slot)
                for name in sorted(block):  # in one order, wherever they were read
                    yield hf_name(index, slot, sub_block, name), block.pop(name)
        yield FINAL_NORM, self.read_final_norm()
        if not self.tied:
            yield HEAD, self.read_head()

    def reach(self, sub_block: Gqa) -> int | None:
        """The window that an attention needs, None when it covers the child's whole context."""
        return None if sub_block.window is None or sub_block.window >= self.max_length else sub_block.window

    @property
    def num_parameters(self) -> int:
        """Of all tensors that `tensors` yields."""
        return self.structure.num_parameters

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values together, over all layers; windows not deducted."""
        return sum(sub_block.state().per_token for sub_block in self.sub_blocks)

    @property
    def kv_heads(self) -> list[int]:
        """The numbers of KV heads that its layers have, each once."""
        return sorted(
            {layer.attention.num_key_value_heads for layer in self.layers if isinstance(layer.attention, Gqa)}
        )

    @property
    def layer_origins(self) -> list[int] | None:
        """Per layer, the last layer of the parent that it stands for; None when nothing ever changed their number."""
        if all(layer.parent_layer is None for layer in self.layers):
            return None
        return [layer.stands_for for layer in self.layers]


def empty_child(structure: Structure, base: Layer, name: str, dtype: Any = None) -> Child:
    """A child without tensors, for its sizes or its configuration. base: what the configuration's global values describe."""
    return Child(
        name=name,
        layers=tuple(
            ChildLayer(slots=layer, reads=dict.fromkeys(layer, no_tensors), origin=index)
            for index, layer in enumerate(structure.layers)
        ),
        around=structure.with_layers([]), base=base, bos_token_id=None, eos_token_id=None, pad_token_id=None, dtype=dtype,
        tokenizer=None, generation_config=None, parent_name=name, licence=None, read_embedding=no_tensors,  # type: ignore[arg-type]
        read_final_norm=no_tensors, read_head=no_tensors,  # type: ignore[arg-type]
    )  # fmt: skip


def _of_kind(child: Child, slot: str, kind: type[Any]) -> Any:
    found = child.base.get(slot)
    if not isinstance(found, kind):
        what = "nothing" if found is None else f"'{found.kind}'"
        known = getattr(kind, "kind", "swiglu' and 'relu2")
        raise UserError(f"{child.name} has {what} as its usual {slot}: this format has words for '{known}' alone")
    return found


def with_dtype(child: Child, dtype: torch.dtype) -> Child:
    """The child with all tensors but `exact` ones cast to `dtype` when they are read; reading raises UserError where one overflows."""
    import torch

    from puzzle.base.finite import all_finite

    def cast(tensor: Tensor) -> Tensor:
        found = tensor.to(dtype)
        if tensor.dtype != dtype and dtype == torch.float16 and not all_finite(found):
            raise UserError(f"`dtype` float16: a weight of {child.name} exceeds its range of 65504: use bfloat16")
        return found

    def cast_all(read: Read, exact: tuple[str, ...]) -> Read:
        return lambda: {name: tensor if name in exact else cast(tensor) for name, tensor in read().items()}

    layers = tuple(
        replace(layer, reads={slot: cast_all(read, layer.slots[slot].exact) for slot, read in layer.reads.items()})
        for layer in child.layers
    )
    embedding, final_norm, head = child.read_embedding, child.read_final_norm, child.read_head
    return replace(
        child,
        layers=layers,
        dtype=dtype,
        dequantised=False,
        read_embedding=lambda: cast(embedding()),
        read_final_norm=lambda: cast(final_norm()),
        read_head=lambda: cast(head()),
    )
