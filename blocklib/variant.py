"""The contract that every variant of a sub-block keeps, and the registry that finds them.

A variant is one file in `blocklib/variants/` (or a third party's, through the entry-point group
`puzzle.blocks`) holding a frozen dataclass decorated with `@register(kind)`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, runtime_checkable

from torch import nn

from puzzle.base.errors import UserError, nearest
from puzzle.blocklib.layer import KINDS, Kind, LayerSpec, ParentLayer

PARENT = "parent"  # the name under which the parent's own sub-block is always a choice


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a variant keeps in memory, exactly.

    num_parameters counts every tensor of the sub-block, its norm included; kv_elements_per_token counts K and V
    together; window caps the tokens that the cache holds (None: all of them).
    """

    num_parameters: int
    kv_elements_per_token: int = 0
    window: int | None = None


@runtime_checkable
class Variant(Protocol):
    """What blocklib asks of a variant (structural: no base class is needed)."""

    @classmethod
    def parse(cls, text: str) -> Variant | None:
        """The variant that `text` names on the command line, or None when it is another's name.
        Raises UserError when the name is ours but the value is impossible."""

    @classmethod
    def candidates(cls, spec: LayerSpec) -> list[str]:
        """The names that the default search space offers for a parent layer of this shape."""

    @property
    def name(self) -> str: ...

    def matches_parent(self, spec: LayerSpec) -> bool:
        """True when this variant is the parent's own sub-block (then it is not built twice)."""

    def build(self, layer: ParentLayer) -> nn.Module:
        """A module initialised from the parent's weights, in float32."""

    def empty(self, spec: LayerSpec) -> nn.Module:
        """The same module with weights yet to be loaded."""

    def footprint(self, spec: LayerSpec) -> Footprint: ...

    def shape(self, spec: LayerSpec) -> str:
        """A canonical text of all that the run time depends on: the key of the cost table."""

    def to_hf(self, spec: LayerSpec) -> dict[str, Any]:
        """Its entry in the checkpoint's `per_layer_config` (sub-blocks of one layer are merged)."""


_REGISTRY: dict[Kind, list[type[Variant]]] = {"attention": [], "ffn": []}


def register(kind: Kind) -> Callable[[type], type]:
    """Class decorator: offer this variant for `kind` sub-blocks."""

    def add(cls: type) -> type:
        _REGISTRY[kind].append(cls)
        return cls

    return add


@cache
def registry() -> dict[Kind, list[type[Variant]]]:
    """All variants, ours first (in file order), then those of installed entry points `puzzle.blocks`."""
    package = importlib.import_module("puzzle.blocklib.variants")
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"puzzle.blocklib.variants.{module}")
    for entry in importlib.metadata.entry_points(group="puzzle.blocks"):
        entry.load()
    return _REGISTRY


def parse_variant(kind: Kind, text: str, spec: LayerSpec) -> Variant:
    """The variant that `text` names ("kv2", "window-128", "0.5", "linear", "none", "parent").

    Raises UserError for an unknown name (with the nearest known one) or an impossible value.
    """
    if text == PARENT:
        return parent_variant(kind, spec)
    for cls in registry()[kind]:
        if (variant := cls.parse(text)) is not None:
            variant.footprint(spec)  # lets the variant reject a value that this parent cannot take
            return variant
    known = [PARENT, *(n for cls in registry()[kind] for n in cls.candidates(spec))]
    raise UserError(f"unknown {kind} variant '{text}': {nearest(text, known)}")


@cache
def parent_variant(kind: Kind, spec: LayerSpec) -> Variant:
    """The variant that equals the parent's own sub-block."""
    for cls in registry()[kind]:
        if (make := getattr(cls, "parent", None)) is not None:
            return make(spec)
    raise AssertionError(f"no registered {kind} variant can stand for the parent")


def search_space(spec: LayerSpec, attention: str | None, ffn: str | None) -> dict[Kind, list[str]]:
    """Variant names per kind, the parent first; None takes the default. Names that equal the parent are merged.

    attention, ffn: comma-separated names. Raises UserError as `parse_variant` does.
    """
    space: dict[Kind, list[str]] = {}
    for kind, text in zip(KINDS, (attention, ffn), strict=True):
        if text is None:
            names = [n for cls in registry()[kind] for n in cls.candidates(spec)]
        else:
            names = [n.strip() for n in text.split(",") if n.strip()]
        chosen = [PARENT]
        for name in names:
            variant = parse_variant(kind, name, spec)
            if not variant.matches_parent(spec) and variant.name not in chosen:
                chosen.append(variant.name)
        space[kind] = chosen
    return space
