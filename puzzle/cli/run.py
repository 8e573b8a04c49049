"""`puzzle run`"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from puzzle.cli import options


@click.command("run")
@click.argument("recipe", type=options.PATH)
@click.option("--out", type=options.PATH, required=True, metavar="RUN", help="Run directory; new or to continue.")
@options.data
@click.option("--throughput", help="Overrides the recipe's goal.")
@click.option(
    "--rounds", type=int, metavar="N", help="Overrides the recipe's solve.rounds: new scores around the best."
)
@click.option("--size", metavar="NAME", help="The one of the recipe's `sizes` to take.")
@click.option("--run-commands", is_flag=True, help="Let the recipe's `after` run its programs: they can do anything.")
@click.option("--dry-run", is_flag=True, help="Print time, memory and disk of every stage; write nothing.")
@options.as_json
def run_command(
    recipe: Path,
    out: Path,
    data: tuple[str, ...],
    throughput: str | None,
    rounds: int | None,
    size: str | None,
    run_commands: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Go the whole road of RECIPE: library, scores, profile, solve, fuse, heal, what comes after, export, evaluate. Resumable.

    All of it is checked before anything is built. Ends with RUN/result.json: what was promised beside what was measured.

    \b
    Examples:
      puzzle run examples/quickstart.yaml --data /usr/lib/python3 --out runs/quickstart
      puzzle run examples/llama_405b_eight_h100.yaml --out runs/405b --dry-run
      puzzle run examples/llama_nemotron.yaml --size 70b --out runs/70b --dry-run
    """
    from puzzle.choose.goal import GoalOptions
    from puzzle.run.recipe import read_recipe

    over: dict[str, Any] = {} if throughput is None else {"throughput": throughput}
    GoalOptions(**over).read()
    wanted = read_recipe(recipe, size)
    if data:
        wanted.data = list(data)
    wanted.goal = replace(wanted.goal, **over)
    if rounds is not None:
        wanted.solve = replace(wanted.solve, rounds=rounds)
    from puzzle.cli.report import print_result, print_road, print_shapes, print_solution
    from puzzle.run.pipeline import Run
    from puzzle.run.shapes import is_shapes, plan_shapes

    if dry_run and is_shapes(wanted.parent):
        planned = plan_shapes(wanted)
        options.print_json({"schema": 1, **planned}) if as_json else print_shapes(planned)
        return
    if dry_run:
        facts = Run(wanted, out).plan()
        options.print_json({"schema": 1, **facts}) if as_json else print_road(facts)
        return
    result = Run(wanted, out, print_solution, run_commands=run_commands).run()
    options.print_json({"schema": 1, **result}) if as_json else print_result(result)
