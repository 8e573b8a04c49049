"""The errors that a user sees as one line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping
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


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Errors inside name a field, written as `seq_len`, by what `names` has for it."""
    try:
        yield
    except UserError as error:
        told = re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), str(error))
        raise UserError(told) from error


def nearest(value: str, known: Collection[str], likeness: float = 0.5) -> str:
    """A hint such as "did you mean 'kv2'?" or, with nothing near, the list of what is known. likeness: at least, up to 1."""
    close = get_close_matches(value, known, n=1, cutoff=likeness)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


_HINTS = {
    errno.ENOSPC: "disk full while writing {path}: free some space and run the same command again; what was complete is kept and will be reused",
    errno.EFBIG: "{path} is larger than a file may be here ({reason}): raise `ulimit -f`, or choose another file system",
    errno.ENAMETOOLONG: "cannot write {path} ({reason}): choose a shorter name",
}
_HINTS[errno.EDQUOT] = _HINTS[errno.ENOSPC]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk, an unwritable place and whatever else the system says of a file into a UserError that names `path`."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number is None:
            raise
        hint = _HINTS.get(number, "cannot write {path} ({reason}): choose another place or change its permissions")
        raise UserError(hint.format(path=path, reason=os.strerror(number))) from error


def _system_error(error: Exception) -> int | None:
    """Its errno; libraries written in Rust or C++ have it in their text alone, or no more than the reason."""
    if isinstance(error, UserError | OSError):
        return getattr(error, "errno", None)
    told = str(error)
    if found := re.search(r"\(os error (\d+)\)", told):
        return int(found[1])
    return next((number for number in _HINTS if os.strerror(number) in told), None)
