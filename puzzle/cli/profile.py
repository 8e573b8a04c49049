"""`puzzle profile`"""

from __future__ import annotations

from pathlib import Path

import click

from puzzle.cli import options


@click.command("profile")
@click.argument("library", type=options.DIRECTORY, required=False)
@click.option("--gpu", required=True, help="Where costs are measured: cpu is this machine's processor.")
@click.option("--batches", default="1,4,16,64", show_default=True)
@click.option("--prefill", default="64,128,256", show_default=True, help="Prompt lengths.")
@click.option("--contexts", default="64,128,256,512", show_default=True, help="Cached tokens before a decode step.")
@click.option("--seconds", type=float, default=0.2, show_default=True, help="Spent on a point in each round.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Walks over the whole grid; medians count.")
@click.option("--shapes", default=None, metavar="NAME", help="Measure a well-known parent's shapes, without a LIBRARY.")
@click.option("--fp8", is_flag=True, help="On a GPU: weights and KV cache in fp8.")
@click.option("--engine", default=None, help="Fit this serving engine's overheads instead (with --fit).")
@click.option("--fit", "fit_path", type=options.DIRECTORY, default=None, metavar="FILE.csv", help="What it measured.")
@click.option(
    "--out", type=options.DIRECTORY, default=None, help="Where the fit goes; default: fit.json beside FILE.csv."
)
@options.parent
@click.option("--dry-run", is_flag=True, help="Print the number of points and the time; measure nothing.")
@options.as_json
def profile_command(
    library: Path | None,
    gpu: str,
    batches: str,
    prefill: str,
    contexts: str,
    seconds: float,
    rounds: int,
    shapes: str | None,
    fp8: bool,
    engine: str | None,
    fit_path: Path | None,
    out: Path | None,
    parent: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure prefill and decode time of every variant in LIBRARY, as it runs inside a model.

    Writes LIBRARY/costs/GPU/NAME.csv, which `puzzle solve` reads. On a GPU the grid is fixed (batch 1 to 512, contexts to
    128k), finished points survive an interruption, and those that do not fit in memory are recorded as such.

    \b
    Examples:
      puzzle profile lib --gpu cpu
      puzzle profile lib --gpu cpu --batches 1,32 --prefill 512 --contexts 512,768 --dry-run
      puzzle profile lib --gpu h100
      puzzle profile --shapes llama-3.1-8b --gpu h100 --out costs
      puzzle profile --engine vllm --gpu h100 --fit measured.csv
    """
    from puzzle.base.errors import UserError

    if engine is not None or fit_path is not None:
        if engine is None or fit_path is None:
            raise UserError("--engine and --fit go together: name the engine and the CSV of what it measured")
        _fit(engine, gpu, fit_path, out, as_json)
        return
    if shapes is not None or gpu != "cpu":
        _on_gpu(library, shapes, gpu, fp8, out, dry_run, as_json)
        return
    if library is None:
        raise UserError("nothing to profile: name a LIBRARY (see `puzzle build-library`)")
    options.positive("--seconds", seconds)
    options.positive("--rounds", rounds)
    found = [
        options.numbers(o, t) for o, t in (("--batches", batches), ("--prefill", prefill), ("--contexts", contexts))
    ]
    from puzzle.library.manifest import Library

    opened = Library.open(library)
    if dry_run:
        different = {opened.variant(k, v)["shape"] for k in ("attention", "ffn") for v in opened.variants(k)} - {"none"}
        points = (len(different) + 3) * len(found[0]) * (len(found[1]) + len(found[2]))
        facts = {"points": points, "rounds": rounds, "predicted_seconds_at_least": round(points * rounds * seconds, 1)}
        if as_json:
            options.print_json(facts)
        else:
            click.echo(
                f"{points} points, {rounds} rounds: at least {points * rounds * seconds:.0f} s (predicted)", err=True
            )
        return
    from puzzle.profile.cpu import Grid, profile_library

    grid = Grid(batches=found[0], prefill=found[1], decode=found[2], seconds=seconds, rounds=rounds)
    path = profile_library(library, gpu=gpu, grid=grid, parent=parent)
    options.print_json({"costs": str(path)}) if as_json else click.echo(f"wrote {path}", err=True)


def _on_gpu(
    library: Path | None, shapes: str | None, gpu: str, fp8: bool, out: Path | None, dry_run: bool, as_json: bool
) -> None:
    from puzzle.base.errors import UserError
    from puzzle.library.manifest import Library
    from puzzle.parents.known import named_shapes, shapes_of_facts
    from puzzle.profile.gpu import SECONDS_PER_POINT, count_points, profile_shapes

    if (library is None) == (shapes is None):
        raise UserError(f"--gpu {gpu} wants a LIBRARY, or --shapes with a name: one of the two")
    opened = None if library is None else Library.open(library)
    known = named_shapes(shapes) if shapes is not None else shapes_of_facts(opened.facts["model"])  # type: ignore[union-attr]
    space = None if opened is None else {kind: opened.variants(kind) for kind in ("attention", "ffn")}
    if dry_run:
        points = count_points(known, space)
        facts = {"points": points, "predicted_seconds": round(points * SECONDS_PER_POINT)}
        options.print_json(facts) if as_json else click.echo(
            f"{points} points, about {facts['predicted_seconds']} s (predicted)", err=True
        )
        return
    name = shapes or opened.facts["parent"]["name"]  # type: ignore[union-attr]
    folder = out or (library / "costs" if library is not None else Path("costs"))
    device = "cpu" if gpu == "cpu" else "cuda"
    path, facts = profile_shapes(name, gpu=gpu, out=folder / gpu, device=device, fp8=fp8, shapes=known, space=space)
    options.print_json({"costs": str(path), **facts}) if as_json else click.echo(
        f"wrote {path}: {facts['points']} points, {facts['points_per_minute']:g} a minute", err=True
    )


def _fit(engine: str, gpu: str, path: Path, out: Path | None, as_json: bool) -> None:
    from puzzle.base.files import check_writable
    from puzzle.cli.report import print_fit
    from puzzle.profile.engine_fit import fit_engine

    check_writable((out or path).absolute().parent)
    value = fit_engine(engine, path, out, gpu=gpu)
    if as_json:
        options.print_json({"schema": 1, **value})
    else:
        print_fit(value)
        click.echo(f"wrote {out or path.with_name('fit.json')}", err=True)
