"""What `puzzle solve --finalists|--rounds` and `puzzle rescore` do with children that are to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puzzle.cli import options
from puzzle.cli.report import print_finalists

if TYPE_CHECKING:
    from puzzle.choose.options import SolveOptions
    from puzzle.choose.problem import Selection
    from puzzle.library.children import Children
    from puzzle.library.manifest import Library
    from puzzle.measure.architecture import Architecture


def children_of(library: Library, data: Sequence[str], parent: str | None, **text: Any) -> Children:
    """Of the options that `options.held_out` adds."""
    from puzzle.library.children import Children
    from puzzle.library.score import ScoreOptions

    return Children(library, data, ScoreOptions(**text), parent)


def choose_measured(
    selection: Selection,
    asked: SolveOptions,
    children: Children,
    out: Path,
    start: Architecture | None = None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure them, write what was found into OUT, and print it; of a dry run what would be measured. start: as of `solve_measured`."""
    from puzzle.choose.refine import plan_measured, solve_measured

    if dry_run:
        options.show(lambda: plan_measured(selection, asked, children), as_json, options.print_facts)
        return
    refined = solve_measured(selection, asked, children, start)
    refined.write(out)
    if as_json:
        options.print_json({"schema": 1, **refined.to_json()})
    else:
        print_finalists(refined)
        click.echo(f"wrote {out / 'architecture.json'} and {out / 'finalists.csv'}", err=True)
