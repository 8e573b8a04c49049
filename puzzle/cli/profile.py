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
    Mode("with `all_reduce`", lambda p: p["all_reduce"], uses="library gpu tp all_reduce out as_json"),
    Mode(
        "with `engine` and `fit`",
        lambda p: p["engine"] is not None and p["fit_path"] is not None,
        uses="gpu engine fit_path out as_json all_reduce",  # which refuses these itself
    ),
    Mode("with `run`", lambda p: p["run"], unused="prefill seconds rounds tp"),
    Mode("without `run`", lambda p: not p["run"], unused="python reader"),
    Mode("with `shapes`", lambda p: p["shapes"] is not None, unused="library"),
    Mode("with `gpu` cpu and no `run`", lambda p: p["gpu"] == "cpu" and not p["run"], unused="fp8"),
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
@click.option(
    "--tp", type=int, default=1, metavar="N", help="Measure the shares that N GPUs have of every sub-block: on one."
)
@click.option(
    "--all-reduce", is_flag=True, help="Measure the all-reduces between the --tp GPUs of this host, under torchrun."
)
@click.option("--engine", help="Fit this serving engine's overheads instead (with --run or --fit).")
@click.option(
    "--run", is_flag=True, help="Measure architectures of the parent's shapes in the engine that is installed."
)
@options.engine_python
@options.engine_reader
@click.option("--fit", "fit_path", type=options.PATH, metavar="FILE.csv", help="What it measured.")
@click.option("--out", type=options.PATH, help="Where it goes: costs, or a fit. Default: beside FILE.csv.")
@click.option("--dry-run", is_flag=True, help="Print the number of points and the time; measure nothing.")
@options.as_json
def profile_command(
    library: Path | None,
    gpu: str,
    shapes: str | None,
    fp8: bool,
    tp: int,
    all_reduce: bool,
    engine: str | None,
    run: bool,
    python: Path | None,
    reader: str,
    fit_path: Path | None,
    out: Path | None,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Measure prefill and decode time of every sub-block in LIBRARY, as it runs inside a model.

    Writes LIBRARY/costs/GPU/NAME.csv, which `puzzle solve` reads. Finished points survive an interruption, and those that do not
    fit in memory are recorded as such.

    With --engine vllm --run, six architectures with random weights run in vLLM, each in a process of its own, and a model of it is
    fitted to them: COSTS/GPU/vllm/NAME/fit.json, which `puzzle solve --engine vllm` reads.

    \b
    Examples:
      puzzle profile lib --gpu cpu
      puzzle profile lib --gpu cpu --batches 1,32 --prefill 512 --contexts 512,768 --dry-run
      puzzle profile lib --gpu h100
      puzzle profile --shapes llama-3.1-8b --gpu h100 --out costs
      puzzle profile lib --gpu h100 --tp 2
      torchrun --nproc-per-node 2 -m puzzle profile --gpu h100 --tp 2 --all-reduce --out lib/costs
      puzzle profile lib --engine vllm --gpu h100 --run
      puzzle profile --shapes llama-3.1-8b --engine vllm --gpu h100 --run --fp8 --python .engines/vllm/bin/python
      puzzle profile --engine vllm --gpu h100 --fit measured.csv
    """
    if not run and (engine is not None or fit_path is not None):
        if engine is None or fit_path is None:
            raise UserError(
                "`engine` goes with `run`, which measures it here, or with `fit` and the CSV of what it measured"
            )
        _fit(engine, gpu, fit_path, out, as_json)
        return
    from puzzle.blocklib.sub_block import check_tp

    check_tp(tp)
    folder = out or (Path("costs") if library is None else library / "costs")
    if all_reduce:
        _all_reduce(gpu, tp, folder, as_json)
        return
    if not options.alone():
        raise UserError(
            "`puzzle profile` measures in one process: start it without torchrun, which is for `all_reduce`; shares (`tp`) are measured on "
            "one GPU"
        )
    if (library is None) == (shapes is None):
        raise UserError(
            "nothing to profile: name a LIBRARY (see `puzzle build-library`), or `shapes` of a known parent"
        )
    from puzzle.library.manifest import Library
    from puzzle.parents.known import known_structure
    from puzzle.profile import profile as stage

    if run:
        lengths = {name: chosen[name] for name in ("batches", "contexts")}
        _run(engine, library, shapes, gpu, fp8, python, reader, lengths, folder, dry_run, as_json)
        return
    if gpu == "cpu" and chosen["rounds"] is None:
        chosen["rounds"] = 3
    asked = stage.ProfileOptions(gpu=gpu, precision="fp8" if fp8 else None, **chosen)
    grid = asked.grid()
    if tp > 1 and gpu == "cpu":
        raise UserError(f"`tp` {tp}: shares are priced on GPUs, and `gpu` is cpu: leave `tp` out")
    if library is not None:
        opened = Library.open(library)
        subject = stage.subject_of(opened if tp == 1 else opened.shareable(tp)[0])
    else:
        assert shapes is not None
        subject = stage.subject_named(shapes, known_structure(shapes), tp)
    subject = subject.share(tp)
    if dry_run:
        points, each = stage.count_points(subject, grid), grid.seconds if gpu == "cpu" else stage.SECONDS_PER_POINT
        facts = {"points": points, "rounds": grid.rounds, "predicted_seconds": round(points * grid.rounds * each, 1)}
        told = f"{points} points, {grid.rounds} rounds: about {facts['predicted_seconds']:g} s (predicted)"
        options.print_line(facts, as_json, told)
        return
    path, facts = stage.profile(subject, gpu=gpu, out=folder / gpu, grid=grid, precision=asked.precision)
    told = f"wrote {path}: {facts['points']} points, {facts['points_per_minute']:g} a minute"
    options.print_line({"costs": str(path), **facts}, as_json, told)


def _all_reduce(gpu: str, tp: int, folder: Path, as_json: bool) -> None:
    from puzzle.base.console import console
    from puzzle.profile.all_reduce_timer import measure_all_reduces

    path, facts = measure_all_reduces(gpu, tp, folder)
    if not console.quiet:
        told = f"wrote {path}: {facts['points']} sizes between {tp}, {facts['smallest_us']:.3g} µs the smallest"
        options.print_line({"all_reduces": str(path), **facts}, as_json, told)


def _run(
    engine: str | None,
    library: Path | None,
    shapes: str | None,
    gpu: str,
    fp8: bool,
    python: Path | None,
    reader: str,
    grid: dict[str, Any],
    costs: Path,
    dry_run: bool,
    as_json: bool,
) -> None:
    from puzzle.cli.report import print_fit
    from puzzle.library.manifest import Library
    from puzzle.parents.known import known_structure
    from puzzle.serving import engine_profile as stage
    from puzzle.serving.engine_run import Engine, check_engine

    if engine is None:
        raise UserError("`run` needs `engine`: name the one that is installed, such as --engine vllm")
    check_engine(engine)
    opened = None if library is None else Library.open(library)
    name, structure = (shapes, known_structure(shapes or "")) if opened is None else (opened.name, opened.origin)
    precision = "fp8" if fp8 else "float32" if gpu == "cpu" else "bf16"
    how, asked = Engine(gpu=gpu, python=python, reader=reader, precision=precision), stage.EngineGrid(**grid)
    folder = costs / gpu / engine / f"{name}{'-fp8' * fp8}"
    if dry_run:
        points = len(asked.points(gpu, structure.max_length))
        names = list(stage.architectures(stage.fitting(structure, how)))
        facts = {"architectures": names, "points": points, "out": str(folder)}
        told = f"{len(names)} architectures ({', '.join(names)}), {points} points each, into {folder}"
        options.print_line(facts, as_json, told)
        return
    value = stage.profile_engine(engine, structure, how, folder, asked)
    options.print_json({"schema": 1, **value}) if as_json else print_fit(value)
    click.echo(f"wrote {folder / 'fit.json'}", err=True)


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
