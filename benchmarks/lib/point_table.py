"""A CSV of measured points that grows row by row, so that a run which is cut off leaves what it had."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

Row = dict[str, str]


class PointTable:
    """columns: of the file, in order; point: those that say what was measured, so that a row of the same point is replaced.
    fill: writes into all rows what is computed from several of them. Only the first rank writes."""

    def __init__(
        self,
        path: Path,
        columns: str,
        point: Sequence[str],
        *,
        append: bool,
        writes: bool,
        fill: Callable[[list[Row]], None] = lambda rows: None,
    ):
        self.path, self.columns, self.point, self.writes, self.fill = path, columns.split(","), point, writes, fill
        self.rows: list[Row] = []
        if append and path.is_file():
            with open(path, newline="", encoding="utf-8") as handle:
                self.rows = list(csv.DictReader(handle))
            if any(not set(row) <= set(self.columns) for row in self.rows):
                raise RuntimeError(f"{path} has other columns: leave --append out, or name another --csv")

    def add(self, row: Row) -> None:
        self.rows = [old for old in self.rows if any(old[k] != row[k] for k in self.point)] + [row]
        if not self.writes:
            return
        self.fill(self.rows)
        print(*row.values(), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
