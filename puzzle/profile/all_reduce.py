"""Tables of all-reduces: seconds of summing one message over the GPUs of a host. Needs no torch.

costs/all_reduce/<gpu>.csv, a row per (tp, num_bytes): the median time that one all-reduce of bf16 adds to a product of a matrix, in a
CUDA graph of many, of the slowest rank (the shipped ones of eight H200s are older: one after another, which takes longer). `solve --tp` reads the library's own table first, then the one that ships with the package.
"""

from __future__ import annotations

import csv
import io
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import file_hash, write_text

FOLDER = "all_reduce"  # in costs/, beside the folders of GPUs
READ: dict[str, Callable[[str], Any]] = {"tp": int, "num_bytes": int, "seconds": float}
SAME_LINKS = {"h100": "h200", "h200": "h100"}  # both SXM cards have NVLink 4: 900 GB/s to one NVSwitch


@dataclass(frozen=True, kw_only=True, slots=True)
class AllReduceRow:
    """One measured point: the sum of num_bytes over tp GPUs takes so many seconds, the median."""

    tp: int
    num_bytes: int
    seconds: float
    device: str
    versions: str
    date: str


def read_all_reduces(path: Path) -> list[AllReduceRow]:
    """Raises UserError for a table that cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            rows = [AllReduceRow(**{f: READ.get(f, str)(v) for f, v in row.items()}) for row in csv.DictReader(handle)]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"all-reduce table {path} is broken ({error}): measure it again") from error
    if not all(0 < row.seconds < float("inf") for row in rows):
        raise UserError(f"all-reduce table {path} has a time that is none: measure it again")
    return rows


def write_all_reduces(path: Path, rows: Sequence[AllReduceRow]) -> None:
    """As CSV, renamed into place."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(AllReduceRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) | {"seconds": f"{row.seconds:.4g}"} for row in rows)
    write_text(path, text.getvalue())


class AllReduces:
    """Seconds by bytes between `tp` ranks: linear between measured sizes, the smallest's below them, and beyond them at the bandwidth of
    the last two. More bytes may take less: three times a power of two often takes longer than the next power. stands_in: for which GPU,
    where it was measured on another one."""

    def __init__(self, path: Path, tp: int, rows: Sequence[AllReduceRow], stands_in: str | None = None):
        self.path, self.tp, self.stands_in = path, tp, stands_in
        self.device, self.versions, self.date = rows[0].device, rows[0].versions, rows[0].date
        sizes: dict[int, list[float]] = {}
        for row in rows:
            sizes.setdefault(row.num_bytes, []).append(row.seconds)
        self.points = sorted((size, median(times)) for size, times in sizes.items())

    @property
    def largest(self) -> int:
        """Bytes of the largest measured message."""
        return self.points[-1][0]

    @property
    def facts(self) -> dict[str, Any]:
        """For architecture.json."""
        return {"device": self.device, "date": self.date, "sha256": file_hash(self.path), "stands_in": self.stands_in}

    def seconds(self, num_bytes: int) -> float:
        points = self.points
        at = bisect_left(points, (num_bytes, 0.0))
        if at == 0 or len(points) == 1:
            return points[0][1] if at == 0 else points[0][1] * num_bytes / points[0][0]
        (left, low), (right, high) = points[min(at, len(points) - 1) - 1 :][:2]
        if at == len(points) and high <= low:
            return high * num_bytes / right
        return low + (high - low) * (num_bytes - left) / (right - left)


def find_all_reduces(gpu: str, tp: int, roots: Sequence[Path]) -> AllReduces:
    """The table of `gpu`, or of one with the same links. roots: as `find_costs` has them. Raises UserError where neither was measured."""
    own = gpu.split("-")[0]
    for name in (own, SAME_LINKS.get(own)):
        for root in roots if name is not None else ():
            path = root / FOLDER / f"{name}.csv"
            rows = [row for row in read_all_reduces(path) if row.tp == tp] if path.is_file() else []
            if rows:
                return AllReduces(path, tp, rows, None if name == own else own)
    raise UserError(
        f"`tp` {tp}: no all-reduces between {tp} of `gpu` {gpu} were measured: run {measuring(gpu, tp, 'LIBRARY')} there"
    )


def measuring(gpu: str, tp: int, library: str) -> str:
    """The command that measures a table."""
    return f"`torchrun --nproc-per-node {tp} -m puzzle profile {library} --gpu {gpu} --tp {tp} --all-reduce`"
