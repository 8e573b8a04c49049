"""`puzzle rescore`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.base.errors import UserError
from puzzle.base.files import check_writable
from puzzle.cli import options


@click.command("rescore")
@click.argument("library", type=options.PATH)
@click.argument("architecture", type=options.PATH)
@click.option("--gpu", required=True, help="Whose costs: those that it was solved with.")
@click.option("--shapes", help="Which of several cost tables, or of an engine's fits.")
@click.option("--engine", default="puzzle", help="Who serves, as it was solved.")
@click.option(
    "--rounds", type=int, default=1, metavar="N", help="Score anew around the best, N times or until no gain."
)
@options.held_out
@options.dry_run
@click.option("--out", type=options.PATH, help="Default: LIBRARY/rescored.")
@options.as_json
def rescore_command(
    library: Path,
    architecture: Path,
    gpu: str,
    shapes: str | None,
    engine: str,
    rounds: int,
    out: Path | None,
    as_json: bool,
    dry_run: bool,
    **held_out: Any,
) -> None:
    """Score every replacement in LIBRARY in place of what ARCHITECTURE has there, and solve for its goal with these scores.

    The solver may change 1, 2, 4, … layers; the child of the lowest measured KL is kept, until a round has no gain. What was measured is
    kept in LIBRARY, so that a run that was stopped goes on where it was.

    \b
    Examples:
      puzzle rescore lib lib/solution --gpu cpu --data corpus --rounds 3 --out better
      puzzle rescore lib lib/solution --gpu h100 --data corpus --memory-limit 40GB --dry-run
    """
    from puzzle.choose.again import asked_again
    from puzzle.choose.options import SolveOptions
    from puzzle.cli.finalists import children_of, choose_measured
    from puzzle.library.assemble import architecture_of
    from puzzle.library.manifest import Library
    from puzzle.measure.architecture import architecture_path

    opened, target = Library.open(library), out or library / "rescored"
    check_writable(target)
    solved = architecture_of(architecture_path(architecture), opened)
    asked = SolveOptions(shapes=shapes, engine=engine, tp=solved.tp, rounds=rounds)
    asked.check()
    opened = asked.shared(opened, gpu)
    selection = asked_again(opened, solved, asked, gpu)
    if target.resolve() == architecture_path(architecture).resolve().parent:
        raise UserError(f"`out` {target} is where {architecture} lies: choose another directory")
    children = children_of(opened, **held_out)
    choose_measured(selection, asked, children, target, solved, dry_run=dry_run, as_json=as_json)
