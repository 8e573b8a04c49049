"""What a model is made of, as a value: the sub-blocks of every layer and slot, and what stands around them. Needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from puzzle.blocklib.sub_block import SubBlock, parse_key
from puzzle.parents.rope import Rope

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VOCAB_PADDING = 64  # words that a vocabulary is padded to before it is shared
_KINDS = {"int": (int,), "float": (int, float), "bool": (bool,)}  # of values in JSON, by a field's type
Layer = Mapping[str, SubBlock]  # by slot, in the order of the residual stream: {"attention": Gqa, "ffn": SwiGLU}


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """A whole model. Layers need not be alike. ropes: by the name that sub-blocks have for them. norm_eps, norm_offset: of the
    final norm. embedding_scale multiplies what the embedding gives, logits_divisor divides the logits."""

    hidden_size: int
    vocab_size: int
    max_length: int
    tied: bool
    norm_eps: float
    norm_offset: bool = False
    embedding_scale: float = 1.0
    logits_divisor: float = 1.0
    ropes: Mapping[str, Rope]
    layers: tuple[Layer, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of all slots, in the order of their first layer."""
        return tuple(dict.fromkeys(slot for layer in self.layers for slot in layer))

    @property
    def num_fixed_parameters(self) -> int:
        """Of what no choice changes: embedding, head, final norm. Tied ones count once."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2) + self.hidden_size

    @property
    def num_parameters(self) -> int:
        return self.num_fixed_parameters + sum(sub_block.num_parameters for _, _, sub_block in self)

    @property
    def active_parameters(self) -> int:
        """That a token uses: of a mixture of experts its own."""
        return self.num_fixed_parameters + sum(sub_block.active_parameters() for _, _, sub_block in self)

    @property
    def usual(self) -> dict[str, SubBlock]:
        """In every slot, what most layers have there."""
        return {
            slot: Counter(layer[slot] for layer in self.layers if slot in layer).most_common(1)[0][0]
            for slot in self.slots
        }

    def __iter__(self) -> Iterator[tuple[int, str, SubBlock]]:
        """(layer, slot, sub-block), from the embedding to the head."""
        for index, layer in enumerate(self.layers):
            for slot, sub_block in layer.items():
                yield index, slot, sub_block

    def rope_tables(self, length: int, device: torch.device | str) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, cos and sin of sequences of `length` tokens. [length, R] float32 each"""
        return {name: rope.tables(length, device) for name, rope in self.ropes.items()}

    def with_layers(self, layers: Sequence[Layer]) -> Structure:
        return replace(self, layers=tuple(layers))

    def share(self, tp: int) -> Structure:
        """What each of `tp` ranks holds: its share of every sub-block and of the vocabulary, which is padded as vLLM does. What
        stands around them is whole. Raises UserError for a sub-block that cannot be shared by so many."""
        if tp == 1:
            return self
        layers = [{slot: sub_block.shared(tp) for slot, sub_block in layer.items()} for layer in self.layers]
        padded = -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
        return replace(self.with_layers(layers), vocab_size=padded // tp)

    def timed(self) -> Structure:
        """The structure as a clock sees it: sub-blocks and RoPE without what changes no time."""
        layers = [{slot: sub_block.timed() for slot, sub_block in layer.items()} for layer in self.layers]
        rope = next(iter(self.ropes.values()))
        return replace(self.with_layers(layers), ropes={"default": rope.timed()})

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "ropes": {name: rope.to_json() for name, rope in self.ropes.items()},
            "layers": [{slot: sub_block.key() for slot, sub_block in layer.items()} for layer in self.layers],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Structure:
        """Raises UserError for a sub-block that is not understood, ValueError for a value that cannot be."""
        for field in fields(cls):
            kind, found = _KINDS.get(str(field.type)), value.get(field.name, field.default)
            if kind is not None and not (type(found) in kind and 0 <= found < math.inf):
                raise ValueError(f"{field.name} is {found!r}")
        read = cache(parse_key)  # equal sub-blocks are one
        layers = tuple({slot: read(key) for slot, key in layer.items()} for layer in value["layers"])
        return cls(
            **{**value, "ropes": {name: Rope(**rope) for name, rope in value["ropes"].items()}, "layers": layers}
        )
