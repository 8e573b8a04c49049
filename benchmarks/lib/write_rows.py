"""The rows of a benchmark as a CSV, and those that an earlier call has left there."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All of them, in the columns of the first; written again as they come."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path, append: bool) -> list[dict[str, Any]]:
    """What is there, to go on from; none where that is not wanted."""
    if not append or not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))
