"""A CSV of measured points that grows row by row, so that a run which is cut off leaves what it had."""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from puzzle.base.files import write_text

Row = dict[str, str]


class PointTable:
    """columns: of the file, in order; point: those that say what was measured, so that a row of the same point is replaced.
    fill: writes into all rows what is computed from several of them. Only the first rank writes. shared: other processes, of other
    measurements, add to the same file meanwhile."""

    def __init__(
        self,
        path: Path,
        columns: str,
        point: Sequence[str],
        *,
        append: bool,
        writes: bool,
        fill: Callable[[list[Row]], None] = lambda rows: None,
        shared: bool = False,
    ):
        self.path, self.columns, self.point, self.writes, self.fill = path, columns.split(","), point, writes, fill
        self.shared = shared
        self.rows: list[Row] = self._read() if append else []

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        if any(not set(row) <= set(self.columns) for row in rows):
            raise RuntimeError(f"{self.path} has other columns: leave --append out, or name another --csv")
        return rows

    def has(self, **known: str) -> bool:
        """Whether there is a row with these values."""
        return any(all(row[name] == value for name, value in known.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone() if self.shared else nullcontext():
            rows = self._read() if self.shared else self.rows
            self.rows = [old for old in rows if any(old[k] != row[k] for k in self.point)] + [row]
            if not self.writes:
                return
            self.fill(self.rows)
            text = io.StringIO()
            writer = csv.DictWriter(text, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            write_text(self.path, text.getvalue())
        print(*row.values(), flush=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The only one that holds the file's folder so."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)
