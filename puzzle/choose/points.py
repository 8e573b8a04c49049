"""Global points of a parent: itself, and what it was sliced to, each with a library of its own under LIB/points. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from puzzle.base.errors import UserError
from puzzle.library.manifest import Library

FOLDER = "points"  # in the library of the whole parent


def points_of(library: Library, hidden: Sequence[int] | None, depth: Sequence[int] | None) -> list[Library]:
    """The libraries of every pair of these widths and depths, the largest parent first; None: of any. `library` itself is its parent's.

    Raises UserError for a pair that none is of, with the commands that make one, and for a library of another parent.
    """
    if library.point is not None:
        raise UserError(
            f"library {library.root} is of a sliced parent ({library.point.told}): name the library of {library.point.name}, which has "
            f"this one in its {FOLDER}/"
        )
    known = [library, *(Library.open(path.parent) for path in sorted((library.root / FOLDER).glob("*/library.json")))]
    for one in known[1:]:
        if one.point is None or one.point.fingerprint != library.fingerprint:
            raise UserError(
                f"library {one.root} is not of a parent that was sliced from {library.name}: move it out of {library.root / FOLDER}"
            )
    found = []
    widths: Sequence[int | None] = hidden or [None]
    depths: Sequence[int | None] = depth or [None]
    for width, layers in product(widths, depths):
        here = [
            one
            for one in known
            if width in (None, one.structure.hidden_size) and layers in (None, one.structure.num_layers)
        ]
        if not here:
            raise UserError(_missing(library, known, width, layers))
        found += here
    return sorted(found, key=lambda one: -one.structure.num_parameters)


def _missing(library: Library, known: Sequence[Library], width: int | None, layers: int | None) -> str:
    sizes = {"hidden": width, "depth": layers}
    told = " and ".join(f"`{name}` {size}" for name, size in sizes.items() if size)
    flags = " ".join(f"--{name} {size}" for name, size in sizes.items() if size)
    name = "-".join(f"{name[0]}{size}" for name, size in sizes.items() if size)
    there = ", ".join(f"{one.structure.hidden_size} x {one.structure.num_layers}" for one in known)
    root = library.root / FOLDER / name
    return (
        f"no library for {told} (there are {there}): run `puzzle slice PARENT {flags} --data TEXT --out {root}/parent`, then `puzzle "
        f"build-library {root}/parent --data TEXT --out {root}` and its `puzzle profile`"
    )
