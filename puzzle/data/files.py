"""From a place that a user names (a directory, a glob, a file) to files, and from a file to texts.

A file's suffix says how it is read, here and nowhere else.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError

TEXT_SUFFIXES = frozenset((
    ".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cpp", ".hpp", ".cc", ".cu", ".rs", ".go", ".java", ".js", ".ts",
    ".html", ".css", ".sh", ".toml", ".yaml", ".yml", ".tex", ".sql", ".rb", ".jl",
))  # fmt: skip
TABLE_SUFFIXES = frozenset((".jsonl", ".parquet"))


def list_files(place: str) -> list[tuple[str, Path]] | None:
    """(relative path, path) of every file of `place`, by path; None when it can only be a `datasets` name.

    Raises UserError for a place that does not exist or has no text.
    """
    path, suffixes = Path(place), TEXT_SUFFIXES | TABLE_SUFFIXES
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in suffixes and p.is_file()]
        if not files:
            raise UserError(
                f"`data` {place} has no text files (looked for {', '.join(sorted(suffixes))}): "
                "give a glob such as 'DIR/**/*.log' for other names"
            )
        return [(str(p.relative_to(path)), p) for p in files]
    if path.is_file():
        return [(path.name, path)]
    if any(c in place for c in "*?["):
        files = [p for p in map(Path, sorted(glob.glob(place, recursive=True))) if p.is_file()]
        if not files:
            raise UserError(f"`data` {place} matches no file: check the pattern (quote it, and use ** for subfolders)")
        root = Path(place[: min(place.index(c) for c in "*?[" if c in place)]).parent
        return [(os.path.relpath(p, root), p) for p in files]
    if place.startswith((".", "/", "~")) or place.count("/") > 1 or path.suffix in suffixes:
        raise UserError(f"`data` {place} does not exist: give a directory, a glob, a file, or a datasets name")
    return None


def in_seeded_order(files: list[tuple[str, Path]], seed: int) -> list[Path]:
    """The paths of (name, path), in an order that `seed` and the names alone determine."""
    return [path for _, path in sorted(files, key=lambda f: hashlib.sha256(f"{seed}:{f[0]}".encode()).digest())]


def is_table(path: Path) -> bool:
    return path.suffix in TABLE_SUFFIXES


def read_texts(path: Path, text_field: str) -> Iterator[str]:
    """The file's text, or `text_field` of each row of a table. A file that is no UTF-8 text has none.

    Raises UserError for a table that cannot be read or whose rows have no such text.
    """
    if not is_table(path):
        with suppress(UnicodeDecodeError, OSError):  # not text, or not ours to read
            yield path.read_text(encoding="utf-8")
        return
    for where, value, names in read_field(path, text_field):
        if value is None and path.suffix == ".parquet" and text_field in names:
            continue  # a null
        if not isinstance(value, str):
            raise UserError(f"{where} has no text field '{text_field}' (it has: {', '.join(names)}): pass `text_field`")
        yield value


def read_field(path: Path, field: str) -> Iterator[tuple[str, Any, list[str]]]:
    """(where it stands, value of `field` or None, names of all fields) of each row of a .jsonl or .parquet file.

    Raises UserError for a file that is no such table, and without pyarrow for .parquet.
    """
    return (_read_jsonl if path.suffix == ".jsonl" else _read_parquet)(path, field)


def _read_jsonl(path: Path, field: str) -> Iterator[tuple[str, Any, list[str]]]:
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}): mend or remove it") from error
            value, names = (row.get(field), list(row)) if isinstance(row, dict) else (None, [type(row).__name__])
            yield f"{path} line {number}", value, names


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, Any, list[str]]]:
    try:
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(path)
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow, or convert it to .jsonl") from None
    except Exception as error:  # pyarrow's own error types
        raise UserError(f"{path} is not a readable parquet file ({error})") from error
    names = table.schema_arrow.names
    if field not in names:
        yield str(path), None, names
        return
    batches = table.iter_batches(columns=[field], batch_size=256)
    for number, value in enumerate((v for batch in batches for v in batch.column(0).to_pylist()), 1):
        yield f"{path} row {number}", value, names
