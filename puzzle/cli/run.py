"""`puzzle run`"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from puzzle.cli import options


@click.command("run")
@click.argument("recipe", type=options.DIRECTORY)
@click.option("--out", type=options.DIRECTORY, required=True, metavar="RUN", help="Run directory; new or to continue.")
@options.data
@click.option("--throughput", help="Overrides the recipe's goal.")
@click.option("--dry-run", is_flag=True, help="Print what the library build takes; write nothing.")
@options.as_json
def run_command(
    recipe: Path, out: Path, data: tuple[str, ...], throughput: str | None, dry_run: bool, as_json: bool
) -> None:
    """Go the whole road of RECIPE: library, scores, profile, solve, export, evaluate. Resumable.

    Ends with RUN/result.json: what was promised beside what was measured.

    \b
    Example:
      puzzle run examples/quickstart.yaml --data /usr/lib/python3.11 --out runs/quickstart
    """
    from puzzle.choose.goal import GoalOptions
    from puzzle.run.recipe import naming, read_recipe

    over: dict[str, Any] = {} if throughput is None else {"throughput": throughput}
    GoalOptions(**over).read()
    wanted = read_recipe(recipe)
    if data:
        wanted.data = list(data)
    wanted.goal = replace(wanted.goal, **over)
    from puzzle.run.pipeline import Run, run_recipe

    if dry_run:
        from puzzle.cli.report import print_plan
        from puzzle.library.build import Builder
        from puzzle.library.estimate import predict_seconds
        from puzzle.library.plan import describe
        from puzzle.parents.opened import open_model

        build = Run(wanted, out).build_options()
        with naming("build"):
            builder = Builder(open_model(wanted.parent), build)
            plan = builder.plan()
        facts = describe(plan, predict_seconds(builder, plan), builder.spaces, str(builder.device))
        options.print_json(facts) if as_json else print_plan(facts)
        return
    from puzzle.cli.report import print_result, print_solution

    result = run_recipe(wanted, out, print_solution)

    options.print_json({"schema": 1, **result}) if as_json else print_result(result)
