"""`puzzle report`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.cli import options


@click.command("report")
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="Default: RUN/report.html.")
@options.as_json
def report_command(run: Path, out: Path | None, as_json: bool) -> None:
    """Write one HTML page of what lies in RUN: promise and delivery, frontier, scores, training, tasks, recipe, versions.

    RUN is a directory of `puzzle run`, or any with a library, solutions or children in it. What `puzzle bench`, `evaluate` and `evaluate
    --tasks` print with --json is found as bench*.json, evaluate*.json and tasks*.json. The page says what was not measured and how
    to; it needs no network and no JavaScript.

    \b
    Examples:
      puzzle report runs/quickstart
      puzzle bench lib/solution --gpu cpu --with-parent --json > lib/bench.json && puzzle report lib --out page.html
    """
    from puzzle.page.page import write_page

    options.show(lambda: {"schema": 1, **write_page(run, out)}, as_json, _told)


def _told(made: dict[str, Any]) -> None:
    for title, command in made["missing"].items():
        click.echo(f"not there: {title}: {command}", err=True)
    click.echo(f"wrote {made['report']} ({made['bytes']:,} bytes)", err=True)
