"""One process at a time changes a directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from puzzle.base.errors import UserError, writing
from puzzle.base.files import check_writable

_held: set[Path] = set()  # by this process, which may ask again


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Keep other processes out of `directory`, which is made, and removed again if the block leaves nothing in it.

    The lock is the system's own on DIRECTORY/.lock: it ends with the process, on NFS (where Linux hands it to the server) with the
    host's lease. A file that a killed process has left holds nothing: the next one takes it over and removes it. Raises UserError, with
    host and number of the process that holds it, and for a directory that cannot be made.
    """
    place = directory.absolute().resolve()
    if place in _held:
        yield
        return
    check_writable(directory)
    missing = [path for path in (place, *place.parents) if not path.exists()]
    path = place / ".lock"
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        with writing(path):
            place.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(locked(path, directory))
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
        stack.callback(path.unlink, missing_ok=True)  # while it is locked
        _held.add(place)
        stack.callback(_held.discard, place)
        yield


@contextlib.contextmanager
def locked(path: Path, directory: Path) -> Iterator:
    """The file `path`, open and locked. Raises UserError, with what the holder has written there, where another process has it."""
    while True:
        with open(path, "a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                holder = handle.read() or "another process"
                raise UserError(
                    f"{directory} is being changed by {holder}: wait for it, or use another directory"
                ) from None
            if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):  # else removed in between
                yield handle
                return


def _remove_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for path in directories:
            path.rmdir()
