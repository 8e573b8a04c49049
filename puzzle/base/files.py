"""Small files written whole or not at all, and the hashes that name content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, writing
from puzzle.base.units import bytes_text

SCHEMA = 1  # of files whose content has not changed since the first version


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well it replaces `path`, otherwise it is removed.

    The temporary name is always the same, so that what a killed process left behind is overwritten.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            yield temporary
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any, indent: int | None = 2) -> str:
    """`value` as JSON; its numbers as `finite` has them."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def finite(value: Any, where: str = "") -> Any:
    """`value` as JSON can hold it: an infinity, which says that there is no bound, is None. Raises UserError, naming its place, for NaN."""
    if isinstance(value, Mapping):
        return {name: finite(one, f"{where}.{name}" if where else str(name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one, f"{where}[{number}]") for number, one in enumerate(value)]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        raise UserError(
            f"{where} is not a number (NaN), and is not written: a model or a measurement before it is broken"
        )
    return None


def parse_json(text: str | bytes, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Raises ValueError for what is no JSON, is nested too deeply or has a number of too many digits."""
    try:
        return json.loads(text, parse_constant=parse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: Path, value: dict[str, Any], schema: int = SCHEMA) -> None:
    """Write `value` with `"schema"` first, atomically, as `json_text` does."""
    write_text(path, json_text({"schema": schema, **value}) + "\n")


def read_json(path: Path, made_by: str, schema: int = SCHEMA) -> dict[str, Any]:
    """Read what `write_json` wrote. Raises UserError when missing, broken, or of another schema.

    made_by: the command that makes the file, for the hint.
    """
    value = read_any(path, made_by)
    if value.get("schema") != schema:
        found = value.get("schema")
        raise UserError(f"{path} has schema {found!r}, this version reads {schema}: make it again with `{made_by}`")
    return value


def read_any(path: Path, made_by: str) -> dict[str, Any]:
    """The same, of any schema."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: make it with `{made_by}`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): make it again with `{made_by}`") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object: make it again with `{made_by}`")
    return value


def content_hash(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, of sets sorted. [64 hex digits]"""
    told = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_sorted)
    return hashlib.sha256(told.encode()).hexdigest()


def _sorted(value: Any) -> list[Any]:
    if not isinstance(value, set | frozenset):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return sorted(value)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes. [64 hex digits]"""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def wait_for_files(paths: Sequence[Path], seconds: float = 120) -> None:
    """On a network file system what another host has written is seen after a while. Raises UserError when it is not."""
    missing, until = list(paths), time.monotonic() + seconds
    while missing := [path for path in missing if not path.is_file()]:
        if time.monotonic() > until:
            raise UserError(
                f"{missing[0]}, which another process has written, is not to be seen here after {seconds:g} s: give all hosts "
                "the same directory, and run the same command again"
            )
        os.listdir(missing[0].parent if missing[0].parent.is_dir() else missing[0].parents[1])  # looks anew
        time.sleep(0.1)


def claim_output(out: Path, force: bool, reads: Iterable[str | Path | None] = ()) -> None:
    """Check that `out` can be written as a whole: it is new or empty or, with --force, a checkpoint that puzzle wrote and that holds
    nothing of what is read (`reads`: models, text). Raises UserError."""
    check_writable(out)
    target = out.resolve()
    if Path.cwd().is_relative_to(target):
        raise UserError(
            f"`out` {out} is the current directory, or holds it, and is replaced as a whole: name a new one"
        )
    if not (out.is_dir() and any(out.iterdir())):
        return
    if not force:
        raise UserError(f"`out` {out} is not empty: choose another directory, or pass `force` to replace it")
    manifest = out / "manifest.json"
    if not (manifest.is_file() and "files" in read_any(manifest, "puzzle export")):
        raise UserError(
            f"`out` {out} is no checkpoint that puzzle wrote (it has no manifest.json), and `force` replaces no other: remove it yourself, or "
            "choose another directory"
        )
    for one in reads:
        if one is not None and Path(one).resolve().is_relative_to(target):
            raise UserError(f"`out` {out} is, or holds, {one}, which is read: choose another directory")


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def check_room(directory: Path, needed: int, who: str, parts: str = "") -> None:
    """Raise UserError where `directory`, which may yet have to be created, will not hold `needed` bytes, those that are in it counted.
    who: what needs them, with its verb; parts: of them, in words that end with a separator."""
    free, held = (
        shutil.disk_usage(_nearest(directory)).free,
        sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()),
    )
    if (more := needed - held) > free:
        raise UserError(
            f"{who} {bytes_text(more)} of disk ({parts}predicted) and {bytes_text(free)} are free: free some space, or choose another place"
        )


def check_writable(directory: Path) -> None:
    """Raise UserError unless files can be made in `directory` (which may yet have to be created)."""
    with writing(directory):
        existing = _nearest(directory)
        if not existing.is_dir():
            raise UserError(f"`out` {existing} is a file: give a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "permission denied")
