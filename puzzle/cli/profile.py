"""`puzzle profile`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.base.errors import UserError
from puzzle.base.files import check_writable
from puzzle.cli import options
from puzzle.cli.modes import Mode, Verb

MODES = (
    Mode(
        "with `engine` and `fit`",
        lambda p: p["engine"] is not None and p["fit_path"] is not None,
        uses="gpu engine fit_path out as_json",
    ),
    Mode("with `shapes`", lambda p: p["shapes"] is not None, unused="library"),
    Mode("with `gpu` cpu", lambda p: p["gpu"] == "cpu", unused="fp8"),
)


@click.command("profile", cls=Verb, modes=MODES)
@click.argument("library", type=options.PATH, required=False)
@click.option("--gpu", required=True, help="Where costs are measured: cpu is this machine's processor.")
@click.option("--batches", callback=options.numbers, help="In decode. Default: 1,4,16,64 on a CPU, 1 to 512 on a GPU.")
@click.option(
    "--prefill", callback=options.numbers, help="Prompt lengths. Default: 64,128,256 on a CPU, 128 to 32768 on a GPU."
)
@click.option(
    "--contexts",
    callback=options.numbers,
    help="Cached tokens before a decode step. Default: 64 to 512, 128 to 131072.",
)
@click.option("--seconds", type=float, help="Spent on a point in each round. Default: 0.2, 0.025.")
@click.option(
    "--rounds", type=int, help="Walks over the whole grid, until the machine is steady; medians count. Default: 3, 1."
)
@click.option("--shapes", metavar="NAME", help="Measure a well-known parent's shapes, without a LIBRARY.")
@click.option("--fp8", is_flag=True, help="On a GPU: weights and KV cache in fp8.")
@click.option("--engine", help="Fit this serving engine's overheads instead (with --fit).")
@click.option("--fit", "fit_path", type=options.PATH, metavar="FILE.csv", help="What it measured.")
@click.option("--out", type=options.PATH, help="Where the fit goes; default: fit.json beside FILE.csv.")
@click.option("--dry-run", is_flag=True, help="Print the number of points and the time; measure nothing.")
@options.as_json
def profile_command(
    library: Path | None,
    gpu: str,
    shapes: str | None,
    fp8: bool,
    engine: str | None,
    fit_path: Path | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Measure prefill and decode time of every sub-block in LIBRARY, as it runs inside a model.

    Writes LIBRARY/costs/GPU/NAME.csv, which `puzzle solve` reads. Finished points survive an interruption, and those that do not
    fit in memory are recorded as such.

    \b
    Examples:
      puzzle profile lib --gpu cpu
      puzzle profile lib --gpu cpu --batches 1,32 --prefill 512 --contexts 512,768 --dry-run
      puzzle profile lib --gpu h100
      puzzle profile --shapes llama-3.1-8b --gpu h100 --out costs
      puzzle profile --engine vllm --gpu h100 --fit measured.csv
    """
    if engine is not None or fit_path is not None:
        if engine is None or fit_path is None:
            raise UserError("`engine` and `fit` go together: name the engine and the CSV of what it measured")
        _fit(engine, gpu, fit_path, out, as_json)
        return
    if (library is None) == (shapes is None):
        raise UserError(
            "nothing to profile: name a LIBRARY (see `puzzle build-library`), or `shapes` of a known parent"
        )
    from puzzle.library.manifest import Library
    from puzzle.parents.known import known_structure
    from puzzle.profile import profile as stage

    if gpu == "cpu" and chosen["rounds"] is None:
        chosen["rounds"] = 3
    asked = stage.ProfileOptions(gpu=gpu, precision="fp8" if fp8 else None, **chosen)
    grid = asked.grid()
    if library is not None:
        subject = stage.subject_of(Library.open(library))
    else:
        assert shapes is not None
        subject = stage.subject_named(shapes, known_structure(shapes))
    if dry_run:
        points, each = stage.count_points(subject, grid), grid.seconds if gpu == "cpu" else stage.SECONDS_PER_POINT
        facts = {"points": points, "rounds": grid.rounds, "predicted_seconds": round(points * grid.rounds * each, 1)}
        options.print_json(facts) if as_json else click.echo(
            f"{points} points, {grid.rounds} rounds: about {facts['predicted_seconds']:g} s (predicted)", err=True
        )
        return
    folder = out or (library / "costs" if library is not None else Path("costs"))
    path, facts = stage.profile(subject, gpu=gpu, out=folder / gpu, grid=grid, precision=asked.precision)
    options.print_json({"costs": str(path), **facts}) if as_json else click.echo(
        f"wrote {path}: {facts['points']} points, {facts['points_per_minute']:g} a minute", err=True
    )


def _fit(engine: str, gpu: str, path: Path, out: Path | None, as_json: bool) -> None:
    from puzzle.cli.report import print_fit
    from puzzle.profile.engine_fit import fit_engine

    check_writable((out or path).absolute().parent)
    value = fit_engine(engine, path, out, gpu=gpu)
    if as_json:
        options.print_json({"schema": 1, **value})
    else:
        print_fit(value)
        click.echo(f"wrote {out or path.with_name('fit.json')}", err=True)
