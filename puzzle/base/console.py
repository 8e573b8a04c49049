"""The one rich console: people read stderr, machines read stdout (`--json`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """Print it as it is: brackets are no markup, and the terminal breaks it."""
    console.print(line, markup=False, soft_wrap=True)


class Bar:
    """A running progress bar: `advance()` counts one, `note()` shows a short text beside it."""

    def __init__(self, progress: Progress, task: TaskID):
        self._progress, self._task = progress, task

    def advance(self, count: int = 1) -> None:
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


@contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """Show a bar with counts and time left; on a pipe it prints nothing but the finished line."""
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as shown:
        yield Bar(shown, shown.add_task(title, total=total, note=""))
