"""What lies in a directory of `puzzle run`, or in any with a library, solutions, children and what was measured of them."""

from __future__ import annotations

import csv
import math
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
KINDS = {
    **{kind: f"{kind}.json" for kind in ("recipe", "library", "architecture", "finalists", "result")},
    **{kind: f"{kind}*.json" for kind in ("evaluate", "bench", "tasks")},
    **{"frontier": "frontier.csv", "heal": "heal.jsonl"},
}


class Found:
    """The files of every kind, those of a solution first, then the nearest. Raises UserError for a directory without any, and for a
    file that is not understood when it is read."""

    def __init__(self, root: Path):
        self.root = root
        self.files = {kind: self._named(pattern) for kind, pattern in KINDS.items()}
        if not any(self.files.values()):
            raise UserError(
                f"{root} holds nothing to report: give what `puzzle run` made, or a directory with a library in it"
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
    def architectures(self) -> dict[str, Architecture]:
        """Those that differ, by the names of their files: children carry copies. The first is what the page is about."""
        found: dict[str, Architecture] = {}
        for path in self.files["architecture"]:
            one = read_architecture(path)
            if all(one.layers != other.layers for other in found.values()):
                found[str(path.relative_to(self.root))] = one
        return found

    @property
    def solved(self) -> Architecture | None:
        return next(iter(self.architectures.values()), None)


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Whatever a file holds that it should not becomes one line that names it."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, csv.Error) as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} is not what puzzle writes ({told}): make it again, or move it away") from error


def numbers(*values: Any) -> None:
    """Raise ValueError unless each is a finite number, or None."""
    for value in values:
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"{value!r} is no finite number")
