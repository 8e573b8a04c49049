"""What lies in a directory of `puzzle run`, or in any with a library, solutions, children and what was measured of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from puzzle.base.errors import UserError, first_line
from puzzle.base.files import read_any
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Architecture, read_architecture

T = TypeVar("T")
DEPTH = 3  # of files below the directory: RUN/library/solution/architecture.json
KINDS = {  # what the files of each kind are called
    "library": "library.json",
    "architecture": "architecture.json",
    "result": "result.json",
    "evaluate": "evaluate*.json",
    "bench": "bench*.json",
    "frontier": "frontier.csv",
    "finalists": "finalists.json",
    "heal": "heal.jsonl",
    "tasks": "tasks*.json",
    "recipe": "recipe.json",
}


class Found:
    """The files of every kind, nearest first. Raises UserError for a directory without any, and for a file that is not understood
    as soon as it is read."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise UserError(f"{root} is no directory: give one that `puzzle run` made, or one with a library in it")
        self.root = root
        self.files = {kind: self._named(pattern) for kind, pattern in KINDS.items()}
        if not any(self.files.values()):
            raise UserError(
                f"{root} holds nothing to report: give a directory that `puzzle run` made, or one with a library, a solution or a child in it"
            )

    def _named(self, pattern: str) -> list[Path]:
        found = [path for depth in range(DEPTH) for path in self.root.glob("*/" * depth + pattern) if path.is_file()]
        return sorted(found, key=lambda p: (p.parent.name != "solution", len(p.parts), p))

    def each(self, kind: str, make: Callable[[str, Any], T]) -> list[T]:
        """make(name, value) of every file of a kind, value: what its JSON says, or the path of what is no JSON. Errors name the file."""
        found = []
        for path in self.files[kind]:
            with understood(path):
                value = read_any(path, f"puzzle {kind}") if path.suffix == ".json" else path
                found.append(make(str(path.relative_to(self.root)), value))
        return found

    @cached_property
    def library(self) -> Library | None:
        """The first one."""
        return Library.open(self.files["library"][0].parent) if self.files["library"] else None

    @cached_property
    def architectures(self) -> list[tuple[str, Architecture]]:
        """Those that differ: children carry copies. The first is what the page is about."""
        found: list[tuple[str, Architecture]] = []
        for path in self.files["architecture"]:
            one = read_architecture(path)
            if all(one.layers != other.layers for _, other in found):
                found.append((str(path.relative_to(self.root)), one))
        return found

    @property
    def solved(self) -> Architecture | None:
        return self.architectures[0][1] if self.architectures else None


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Whatever a file holds that it should not becomes one line that names it."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} is not what puzzle writes ({told}): make it again, or move it away") from error
