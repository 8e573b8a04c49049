"""`puzzle solve`"""

from __future__ import annotations

from pathlib import Path

import click

from puzzle.cli import options


@click.command("solve")
@click.argument("library", type=options.DIRECTORY)
@click.option("--throughput", default=None, metavar="GOAL", help="2x (of the parent at its best batch) or tokens/s.")
@click.option(
    "--latency", default=None, metavar="SECONDS", help="From prompt to last token of a batch, e.g. 1.5 or 800ms."
)
@click.option("--memory", default=None, metavar="BYTES", help="Weights and KV cache at full context, e.g. 80GB.")
@click.option("--params", default=None, metavar="COUNT", help="Parameters, e.g. 6.5B.")
@click.option("--gpu", required=True, help="Whose costs: cpu, or a GPU that has been profiled.")
@click.option("--shapes", default=None, help="Which of several cost tables.")
@options.input_len
@options.output_len
@click.option("--backend", type=click.Choice(["ortools", "pulp"]), default="ortools", show_default=True)
@click.option("--time-limit", type=float, default=None, metavar="SECONDS", help="For each batch size.")
@click.option("--out", type=options.DIRECTORY, default=None, metavar="DIR", help="Default: LIBRARY/solution.")
@options.as_json
def solve_command(
    library: Path,
    throughput: str | None,
    latency: str | None,
    memory: str | None,
    params: str | None,
    gpu: str,
    shapes: str | None,
    input_len: int,
    output_len: int,
    backend: str,
    time_limit: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Choose one variant per layer of LIBRARY: the least sum of scores within the goal.

    Needs neither a GPU nor torch. Writes architecture.json; says what is reachable when the goal is not.

    \b
    Examples:
      puzzle solve lib --throughput 2x --gpu cpu --input-len 128 --output-len 128
      puzzle solve lib --throughput 1.5x --memory 24MiB --gpu cpu --backend pulp --json
    """
    if time_limit is not None:
        options.positive("--time-limit", time_limit)
    from puzzle.costs import Workload
    from puzzle.files import check_writable, write_json
    from puzzle.goal import goal_of
    from puzzle.library import Library
    from puzzle.solve import open_costs, solve_library

    goal = goal_of(throughput, latency, memory, params)
    work = Workload(input_len=input_len, output_len=output_len)
    opened = Library.open(library)
    target = (out or library / "solution") / "architecture.json"
    check_writable(target.parent)
    solved = solve_library(opened, open_costs(opened, gpu, shapes), work, goal, backend=backend, time_limit=time_limit)
    write_json(target, solved)
    if as_json:
        options.print_json(solved)
    else:
        from puzzle.report import print_solution

        print_solution(solved, opened)
        click.echo(f"wrote {target}", err=True)
