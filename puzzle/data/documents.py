"""The documents of a source, in an order that depends on a seed alone, and which of them are held out.

The sha256 of a text tells whether two documents are the same one and whether it is held out, so that a text held out by
one verb is held out by all, wherever it lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from puzzle.base.console import say
from puzzle.base.errors import UserError, first_line
from puzzle.data.files import NotText, in_seeded_order, list_files, read_texts, text_of

HELD_OUT_PER_10000 = 200  # 2 % of documents; examples/train_parent.py holds out the same ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where texts come from. paths: directories, globs, files, or `datasets` names. weight: share of the tokens, relative to
    the others. messages: the field of chats, None for plain text. loss: which tokens of a chat count, all or assistant."""

    name: str
    paths: tuple[str, ...]
    weight: float = 1.0
    max_epochs: float | None = None
    text_field: str = "text"
    messages: str | None = None
    loss: str = "all"


def text_key(text: str) -> bytes:
    """What a text is known by: its sha256, 32 bytes."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def is_held_out(key: bytes) -> bool:
    return int.from_bytes(key[:8], "big") % 10_000 < HELD_OUT_PER_10000


def documents(source: Source, seed: int) -> Iterator[str]:
    """The texts of plain sources; files in an order that depends on `seed` and their relative paths alone.

    A file of text that cannot be read is left out of a directory or glob, and said; by its own name it is an error. Raises
    UserError for paths that do not exist, and for files or datasets without such texts.
    """
    if not source.paths:
        raise UserError("no data: pass `data` with a directory, a glob, a .jsonl or .parquet file, or a datasets name")
    files: list[tuple[str, Path]] = []
    for place in source.paths:
        listed = list_files(place)
        if listed is None:
            yield from _hub_documents(place, source.text_field)
        files += listed or []
    named = [Path(place) for place in source.paths]
    for path in in_seeded_order(files, seed):
        try:
            yield from read_texts(path, source.text_field)
        except NotText as error:
            if path in named:
                raise
            _tell(f"left out: {error}")


@cache
def _tell(line: str) -> None:
    """Once, however many stages read the same files."""
    say(line)


def _hub_documents(name: str, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"`data` {name} is no file or directory here; to read it as a datasets name, pip install 'puzzle-nas[heal]'"
        ) from None
    try:
        for row in datasets.load_dataset(name, split="train", streaming=True):
            text = text_of(f"dataset {name}", row.get(text_field), list(row), text_field)
            if text is not None:
                yield text
    except UserError:
        raise
    except Exception as error:  # the hub client raises many kinds
        raise UserError(
            f"`data` {name} is neither a file here nor a dataset that can be loaded ({first_line(error)})"
        ) from error
