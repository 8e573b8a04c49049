"""What `puzzle grow` added to a checkpoint, as grow.json beside the weights says it. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import read_json

FILE = "grow.json"


def grown_beside(directory: Path) -> dict[str, Any] | None:
    """grow.json of the checkpoint in `directory`; None of one that was not grown. Raises UserError for one that is broken."""
    path = directory / FILE
    if not path.is_file():
        return None
    found = read_json(path, "puzzle grow")
    names = found.get("new")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is broken (new names no tensors): make the checkpoint again with `puzzle grow`")
    return found


def new_tensors(directory: Path) -> frozenset[str]:
    """Names of the tensors that were added, as the checkpoint has them; none of one that was not grown."""
    return frozenset((grown_beside(directory) or {"new": ()})["new"])
