"""`puzzle profile`"""

from __future__ import annotations

from pathlib import Path

import click

from puzzle.cli import options


@click.command("profile")
@click.argument("library", type=options.DIRECTORY)
@click.option("--gpu", required=True, help="Where costs are measured: cpu is this machine's processor.")
@click.option("--batches", default="1,4,16,64", show_default=True)
@click.option("--prefill", default="64,128,256", show_default=True, help="Prompt lengths.")
@click.option("--contexts", default="64,128,256,512", show_default=True, help="Cached tokens before a decode step.")
@click.option("--seconds", type=float, default=0.2, show_default=True, help="Spent on a point in each round.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Walks over the whole grid; medians count.")
@options.parent
@click.option("--dry-run", is_flag=True, help="Print the number of points and the time; measure nothing.")
@options.as_json
def profile_command(
    library: Path,
    gpu: str,
    batches: str,
    prefill: str,
    contexts: str,
    seconds: float,
    rounds: int,
    parent: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure prefill and decode time of every variant in LIBRARY, as it runs inside a model.

    Writes LIBRARY/costs/GPU/NAME.csv, which `puzzle solve` reads.

    \b
    Examples:
      puzzle profile lib --gpu cpu
      puzzle profile lib --gpu cpu --batches 1,32 --prefill 512 --contexts 512,768 --dry-run
    """
    options.positive("--seconds", seconds)
    options.positive("--rounds", rounds)
    found = [
        options.numbers(o, t) for o, t in (("--batches", batches), ("--prefill", prefill), ("--contexts", contexts))
    ]
    from puzzle.library import Library

    opened = Library.open(library)
    if dry_run:
        shapes = {opened.variant(k, v)["shape"] for k in ("attention", "ffn") for v in opened.variants(k)} - {"none"}
        points = (len(shapes) + 3) * len(found[0]) * (len(found[1]) + len(found[2]))
        facts = {"points": points, "rounds": rounds, "predicted_seconds_at_least": round(points * rounds * seconds, 1)}
        if as_json:
            options.print_json(facts)
        else:
            click.echo(
                f"{points} points, {rounds} rounds: at least {points * rounds * seconds:.0f} s (predicted)", err=True
            )
        return
    from puzzle.profile import Grid, profile_library

    grid = Grid(batches=found[0], prefill=found[1], decode=found[2], seconds=seconds, rounds=rounds)
    path = profile_library(library, gpu=gpu, grid=grid, parent=parent)
    options.print_json({"costs": str(path)}) if as_json else click.echo(f"wrote {path}", err=True)
