"""`puzzle run`"""

from __future__ import annotations

from pathlib import Path

import click

from puzzle.cli import options


@click.command("run")
@click.argument("recipe", type=options.DIRECTORY)
@click.option("--out", type=options.DIRECTORY, required=True, metavar="RUN", help="Run directory; new or to continue.")
@options.data
@click.option("--throughput", default=None, help="Overrides the recipe's goal.")
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
    from puzzle.recipe import read_recipe

    wanted = read_recipe(recipe)
    if data:
        wanted.data = list(data)
    if throughput is not None:
        wanted.goal.throughput = throughput
    from puzzle.pipeline import Run, run_recipe

    if dry_run:
        from puzzle.build import Builder
        from puzzle.families.family import open_model
        from puzzle.plan import describe
        from puzzle.rehearse import predict_seconds
        from puzzle.report import print_plan

        builder = Builder(open_model(wanted.parent), Run(wanted, out).build_options())
        plan = builder.plan()
        facts = describe(plan, predict_seconds(builder, plan), builder.variants, str(builder.device))
        options.print_json(facts) if as_json else print_plan(facts)
        return
    result = run_recipe(wanted, out)
    from puzzle.report import print_result

    options.print_json({"schema": 1, **result}) if as_json else print_result(result)
