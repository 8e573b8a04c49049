"""What has a price: a sub-block, or what stands around the layers. Needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, TypeAlias

from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.structure import Structure


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """The embedding or the LM head of a model; `key` is its text form in a cost table."""

    name: ClassVar[str]
    hidden_size: int
    vocab_size: int

    def key(self) -> str:
        return f"{self.name} h{self.hidden_size} v{self.vocab_size}"


class Embedding(Ends):
    name: ClassVar[str] = "embedding"


class Head(Ends):
    """Final norm, head and argmax of one position."""

    name: ClassVar[str] = "head"


@dataclass(frozen=True, slots=True)
class Whole:
    """The parent, or its first layers with embedding and head where all would be too large: what the sum of its parts is held against.
    num_layers: None for all."""

    num_layers: int | None = None
    NAME: ClassVar[str] = "model parent"

    def tells_of(self, num_layers: int) -> bool:
        """Whether a parent of so many layers is known by it: these are all of them, or most."""
        return self.num_layers is None or 2 * self.num_layers > num_layers

    def key(self) -> str:
        return self.NAME if self.num_layers is None else f"{self.NAME} first {self.num_layers}"

    @classmethod
    def parse(cls, key: str) -> Whole | None:
        """None for the key of another part."""
        found = re.fullmatch(rf"{cls.NAME}(?: first (\d+))?", key)
        return None if found is None else cls(int(found[1]) if found[1] else None)


Part: TypeAlias = SubBlock | Ends | Whole


def ends_of(structure: Structure) -> list[Part]:
    """Embedding and head."""
    size = {"hidden_size": structure.hidden_size, "vocab_size": structure.vocab_size}
    return [Embedding(**size), Head(**size)]


def shared_name(name: str, tp: int) -> str:
    """What the table of the shares of `tp` ranks is called where that of the whole sub-blocks is NAME or NAME-fp8."""
    usual, fp8 = name.removesuffix("-fp8"), "-fp8" if name.endswith("-fp8") else ""
    return name if tp == 1 or usual.endswith(f"-tp{tp}") else f"{usual}-tp{tp}{fp8}"


@cache
def priced_as(part: Part) -> str:
    """The key under which a cost table has it."""
    return part.timed().key() if isinstance(part, SubBlock) else part.key()
