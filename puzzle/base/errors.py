"""The errors that a user sees as one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class UserError(ValueError):
    """Bad input or an environment that cannot do the job: one line with what was wrong, the value and the fix.

    The CLI prints the message and exits with code 2; there is never a traceback.
    """


def first_line(error: Exception) -> str:
    """Of what a library's error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(value: str, known: list[str]) -> str:
    """A hint such as "; did you mean 'kv2'?" or, with nothing near, the list of what is known."""
    close = get_close_matches(value, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or an unwritable place into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"disk full while writing {path}: free some space and run the same command again; "
                "what was complete is kept and will be reused"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"cannot write {path} ({error.strerror}): choose another place or change its permissions"
            ) from error
        raise
