"""From a place that a user names (a directory, a glob, a file) to files, and from a file to texts.

A file's suffix says how it is read, here and nowhere else.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, first_line
from puzzle.base.files import parse_json

TEXT_SUFFIXES = frozenset((
    ".txt", ".md", ".rst", ".py", ".pyi", ".c", ".h", ".cpp", ".hpp", ".cc", ".cu", ".rs", ".go", ".java", ".js", ".ts",
    ".html", ".css", ".sh", ".toml", ".yaml", ".yml", ".tex", ".sql", ".rb", ".jl",
))  # fmt: skip
TABLE_SUFFIXES = frozenset((".jsonl", ".ndjson", ".parquet"))
ONLY_BY_NAME = frozenset((".json",))  # a table too, but folders are full of configurations
OTHER_TABLES = frozenset((".csv", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx"))
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


class NotText(UserError):
    """A file of text that cannot be read as such."""


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, in small letters, without that of a compression: A.JSONL.gz -> .jsonl"""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED_SUFFIXES), "")


def list_files(place: str) -> list[tuple[str, Path]] | None:
    """(relative path, path) of every file of `place`, by path; None when it can only be a `datasets` name.

    Raises UserError for a place that does not exist or has no text, and for a table of a kind that is not read.
    """
    if not place:
        raise UserError("`data` is empty: give a directory, a glob, a file, or a datasets name")
    path, suffixes = Path(place), TEXT_SUFFIXES | TABLE_SUFFIXES
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if kind_of(p) in suffixes and p.is_file()]
        if not files:
            raise UserError(
                f"`data` {place} has no text files (looked for {', '.join(sorted(suffixes))}): "
                "give a glob such as 'DIR/**/*.log' for other names"
            )
        return [(str(p.relative_to(path)), p) for p in files]
    if path.is_file():
        return _readable([(path.name, path)])
    if any(c in place for c in "*?["):
        files = [p for p in map(Path, sorted(glob.glob(place, recursive=True))) if p.is_file()]
        if not files:
            raise UserError(f"`data` {place} matches no file: check the pattern (quote it, and use ** for subfolders)")
        root = Path(place[: min(place.index(c) for c in "*?[" if c in place)]).parent
        return _readable([(os.path.relpath(p, root), p) for p in files])
    known = kind_of(path) in suffixes | ONLY_BY_NAME | OTHER_TABLES
    if place.startswith((".", "/", "~")) or place.count("/") > 1 or known:
        raise UserError(f"`data` {place} does not exist: give a directory, a glob, a file, or a datasets name")
    return None


def _readable(files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    for _, path in files:
        if kind_of(path) in OTHER_TABLES:
            raise UserError(
                f"`data` {path} is a {kind_of(path)} table, which is not read: convert it to .jsonl or .parquet"
            )
    return files


def in_seeded_order(files: list[tuple[str, Path]], seed: int) -> list[Path]:
    """The paths of (name, path), in an order that `seed` and the names alone determine."""
    return [
        path
        for _, path in sorted(
            files, key=lambda f: hashlib.sha256(f"{seed}:{f[0]}".encode(errors="surrogateescape")).digest()
        )
    ]


def is_table(path: Path) -> bool:
    return kind_of(path) in TABLE_SUFFIXES | ONLY_BY_NAME


def read_texts(path: Path, text_field: str) -> Iterator[str]:
    """The file's text, or `text_field` of each row of a table; a null is no text.

    Raises NotText for a file of text that is not UTF-8 or cannot be opened, UserError for a table that cannot be read or
    whose rows have no such text.
    """
    if not is_table(path):
        try:
            with _opened(path) as handle:
                whole = io.TextIOWrapper(handle, encoding="utf-8-sig").read()
        except UserError as error:
            raise NotText(str(error)) from error
        yield whole
        return
    for where, value, names in read_field(path, text_field):
        if (text := text_of(where, value, names, text_field)) is not None:
            yield text


def text_of(where: str, value: Any, names: list[str], field: str) -> str | None:
    """A row's text; None for a null. Raises UserError for a row without the field, and for what is no text in it."""
    if value is None and field in names:
        return None
    if not isinstance(value, str):
        found = f"{type(value).__name__} in" if field in names else "no text"
        raise UserError(f"{where} has {found} field '{field}' (it has: {', '.join(names)}): pass `text_field`")
    return whole_text(where, value)


def whole_text(where: str, text: str) -> str:
    """The text itself. Raises UserError for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(f"{where} has half a surrogate pair, {half}, in its text: mend or remove the row") from error
    return text


def read_field(path: Path, field: str) -> Iterator[tuple[str, Any, list[str]]]:
    """(where it stands, value of `field` or None, names of all fields) of each row of a table.

    Raises UserError for a file that is no such table, and without pyarrow for .parquet.
    """
    if kind_of(path) == ".parquet":
        yield from _read_parquet(path, field)
        return
    for where, row in (_read_json if kind_of(path) == ".json" else _read_jsonl)(path):
        value, names = (row.get(field), list(row)) if isinstance(row, dict) else (None, [type(row).__name__])
        yield where, value, names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The bytes of the file, unpacked. Raises UserError, also in the block, for what cannot be read, unpacked or decoded."""
    packing = path.suffix.lower()
    modules: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
    if packing == ".zst":
        modules[packing] = _zstd(path)
        errors += (modules[packing].ZstdError,)
    try:
        with modules.get(packing, io).open(path, "rb") as handle:
            yield handle
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02x}): convert it (`iconv -f latin1 -t utf-8`), or "
            "leave it out"
        ) from error
    except errors as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): mend it or leave it out") from error


def _zstd(path: Path) -> Any:
    """Python 3.14's own module, or the package zstandard."""
    for name in ("compression.zstd", "zstandard"):
        with suppress(ImportError):
            return import_module(name)
    raise UserError(f"{path} needs zstandard: pip install zstandard, or unpack it (`zstd -d`)")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as handle:
        for number, line in enumerate(handle, 1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
                raise UserError(
                    f"{where} is not UTF-8 ({byte}): convert the file (`iconv -f latin1 -t utf-8`)"
                ) from error
            if text.strip():
                yield where, _parsed(where, text)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a list, or the one that stands alone; or those of JSON lines."""
    with _opened(path) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8-sig").read()
    try:
        value = _parsed(str(path), text)
    except UserError:
        if len(text.splitlines()) < 2 or not text.lstrip().startswith("{"):
            raise
        yield from _read_jsonl(path)
        return
    rows = value if isinstance(value, list) else [value]
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _parsed(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({getattr(error, 'msg', error)}): mend or remove it") from error


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, Any, list[str]]]:
    if path.suffix.lower() != ".parquet":
        raise UserError(f"{path}: a .parquet file is compressed within; unpack it")
    try:
        import pyarrow.parquet as parquet

        table = parquet.ParquetFile(path)
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow, or convert it to .jsonl") from None
    except Exception as error:  # pyarrow's own error types
        raise UserError(f"{path} is not a readable parquet file ({first_line(error)})") from error
    names = table.schema_arrow.names
    if field not in names:
        yield str(path), None, names
        return
    batches = table.iter_batches(columns=[field], batch_size=256)
    for number, value in enumerate((v for batch in batches for v in batch.column(0).to_pylist()), 1):
        yield f"{path} row {number}", value, names
