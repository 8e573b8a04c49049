"""What a stage of a run is made from, as one hash: however a path was typed, it counts as the place that it leads to."""

from __future__ import annotations

import glob
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from puzzle.base.files import content_hash

PLACES = (
    "child",
    "teacher",
    "origin",
    "data",
)  # texts that are paths where such a place is there, and names where it is not


def key_of(*facts: Any) -> str:
    """facts: options, and mappings by their names. [64 hex digits]"""
    return content_hash([_plain("", fact) for fact in facts])


def _plain(name: str, value: Any) -> Any:
    """JSON of `value`, an option called `name`."""
    if is_dataclass(value):
        return {field.name: _plain(field.name, getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(str(key), one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, one) for one in value]
    is_place = name in PLACES and (os.path.exists(str(value)) or glob.has_magic(str(value)))
    if isinstance(value, Path) or is_place:
        return os.path.realpath(value)
    return value if value is None or isinstance(value, str | int) else str(value)
