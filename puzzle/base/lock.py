"""One process at a time changes a directory, or a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from puzzle.base.errors import UserError, writing
from puzzle.base.files import check_writable

_held: set[Path] = set()  # locks of this process, which may ask again


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Keep other processes out of `directory`, which is made, and removed again if the block leaves nothing in it.

    The lock is the system's own on DIRECTORY/.lock: it ends with the process, on NFS (where Linux hands it to the server) with the
    host's lease. A file that a killed process has left holds nothing: the next one takes it over and removes it. Raises UserError, with
    host and number of the process that holds it, and for a directory that cannot be made.
    """
    with _holding(directory.absolute().resolve() / ".lock", directory, "directory"):
        yield


@contextlib.contextmanager
def holding_file(file: Path) -> Iterator[None]:
    """The same for one file, by whatever name, with a lock beside it."""
    place = file.absolute().resolve()
    with _holding(place.with_name(f".{place.name}.lock"), file, "file"):
        yield


@contextlib.contextmanager
def _holding(path: Path, named: Path, kind: str) -> Iterator[None]:
    """path: of the lock. named: what it is of, as the user calls it."""
    if path in _held:
        yield
        return
    check_writable(path.parent)
    missing = [one for one in path.parents if not one.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(locked(path, named, kind))
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
        stack.callback(path.unlink, missing_ok=True)  # while it is locked
        _held.add(path)
        stack.callback(_held.discard, path)
        yield


@contextlib.contextmanager
def locked(path: Path, named: Path, kind: str = "directory") -> Iterator:
    """The file `path`, open and locked. Raises UserError, with what the holder has written there, where another process has it."""
    while True:
        with open(path, "a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read() or "another process"
                raise UserError(f"{named} is being changed by {holder}: wait for it, or use another {kind}") from None
            if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):  # else removed in between
                yield handle
                return


def _remove_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in directories:
            path.rmdir()
