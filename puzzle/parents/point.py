"""A point of the global axes: what `puzzle slice` made of a whole parent, as slice.json in the new checkpoint says it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puzzle.base.errors import UserError
from puzzle.base.files import read_json

FILE = "slice.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """name, fingerprint: of the whole parent. hidden_size, num_layers, mamba ("120x80": heads and channels of a head; None without
    Mamba-2): of the sliced one. kl, kl_stderr: of its next tokens from the whole one's, in nats, on held-out text."""

    name: str
    fingerprint: str
    hidden_size: int
    num_layers: int
    mamba: str | None
    kl: float
    kl_stderr: float

    @property
    def told(self) -> str:
        mamba = f", Mamba-2 {self.mamba}" if self.mamba else ""
        return f"hidden {self.hidden_size}, depth {self.num_layers}{mamba}"


def point_of(directory: Path) -> Point | None:
    """Of a checkpoint; None of one that was not sliced. Raises UserError for a slice.json that is broken."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        return Point(**read_json(path, "puzzle slice")["point"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is broken ({error}): make the checkpoint again with `puzzle slice`") from error
