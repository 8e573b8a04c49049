"""`puzzle solve`"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from puzzle.base.errors import UserError, writing
from puzzle.base.files import check_writable
from puzzle.base.workload import Workload
from puzzle.choose.goal import AXES, LIMITS, GoalOptions
from puzzle.cli import options
from puzzle.cli.modes import Mode, Verb

RULES = ["greedy", "uniform", "uniform-width", "depth", "random", "no-op", "most-parameters"]
MEASURED = "pareto diverse baseline explain fusion fusion_dependency precision hidden depth"  # modes that are not


def _is_axis(axis: str, given: Mapping[str, Any]) -> bool:
    return given["pareto"] == axis


MODES = (
    Mode("with `problem`", lambda p: p["problem"] is not None, uses="problem backend time_limit out as_json"),
    Mode(
        "with `pareto`",
        lambda p: p["pareto"] is not None,
        unused="diverse min_distance same_batch explain fusion fusion_dependency",
    ),
    *(Mode(f"with `pareto` {axis}", partial(_is_axis, axis), unused=axis) for axis in AXES),
    Mode("without `pareto`", lambda p: p["pareto"] is None, unused="points"),
    Mode(
        "with `diverse`",
        lambda p: p["diverse"] is not None,
        unused="baseline same_batch explain fusion fusion_dependency",
    ),
    Mode(
        "without `diverse` or `finalists`",
        lambda p: p["diverse"] is None and p["finalists"] is None,
        unused="min_distance",
    ),
    Mode("with `finalists`", lambda p: p["finalists"] is not None, unused=MEASURED),
    Mode("with `rounds`", lambda p: p["rounds"] is not None, unused=MEASURED),
    Mode("without `finalists`", lambda p: p["finalists"] is None, unused="pairs"),
    Mode(
        "without `finalists` or `rounds`, which measure children",
        lambda p: p["finalists"] is None and p["rounds"] is None,
        unused=" ".join((*options.HELD_OUT, "dry_run")),
    ),
    Mode(
        "with `baseline`",
        lambda p: p["baseline"] is not None,
        unused="backend time_limit explain fusion fusion_dependency",
    ),
    Mode("without `fusion`", lambda p: not p["fusion"], unused="fusion_dependency"),
    Mode("with `precision`", lambda p: p["precision"] is not None, unused="pareto diverse fusion"),
    Mode(
        "with `hidden` or `depth`",
        lambda p: p["hidden"] is not None or p["depth"] is not None,
        unused="pareto diverse precision fusion",
    ),
    Mode("without `stages`", lambda p: p["stages"] is None, unused="stage_tolerance"),
)


def limits(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every row of `LIMITS`, in its order."""
    for limit in reversed(LIMITS):
        command = click.option(f"--{limit.option.replace('_', '-')}", metavar="GOAL", help=limit.help)(command)
    return command


@click.command("solve", cls=Verb, modes=MODES)
@click.argument("library", type=options.PATH, required=False)
@limits
@click.option("--cached-tokens", metavar="COUNT", help="Tokens whose cache fits --memory too: 300K.")
@click.option(
    "--hidden",
    metavar="SIZES",
    callback=options.numbers,
    help="Global points of these widths, by LIBRARY/points: 4352,4480.",
)
@click.option(
    "--depth", metavar="LAYERS", callback=options.numbers, help="And of these depths: 48,56; the best point counts."
)
@click.option("--keep-attention", type=int, metavar="N", help="At least N layers keep softmax attention.")
@click.option("--pin", "pinned", metavar="RANGES", help="Layers that keep the parent's block: 0-1,15.")
@click.option("--alike", metavar="RANGES", help="Layers that all choose the same: 0-15.")
@click.option("--stages", type=int, metavar="N", help="N contiguous pipeline stages of equal time.")
@click.option("--stage-tolerance", default="5%", metavar="SHARE", help="How far from equal.")
@click.option("--concurrency", type=int, metavar="N", help="Requests at once: what all limits hold at.")
@click.option("--also", multiple=True, metavar="WORKLOAD", help="A further workload: 1024/64@8:ttft=300ms,tpot=20ms.")
@click.option(
    "--fusion", is_flag=True, help="Count on `puzzle fuse`: price neighbours without attention as one wide FFN."
)
@click.option(
    "--fusion-dependency",
    type=options.PATH,
    metavar="JSON",
    help="Charge fused FFNs for it: of the parent, by `puzzle fuse --dependency-only`.",
)
@click.option("--tp", type=int, default=1, metavar="N", help="N GPUs of one host share every sub-block: 2, 4 or 8.")
@click.option("--gpu", help="Whose costs: cpu, or a GPU that has been profiled.")
@click.option("--shapes", help="Which of several cost tables, or of an engine's fits.")
@click.option("--same-batch", is_flag=True, help="2x means of the parent at the child's batch, not at its own best.")
@click.option("--engine", default="puzzle", help="Who serves: our runtime, or vllm (fitted), also vllm==0.26.")
@click.option(
    "--precision", metavar="NAMES", help="Let weights and cache have any of these, bf16,fp8; the parent has the first."
)
@options.input_len
@options.output_len
@click.option(
    "--backend",
    type=click.Choice(["ortools", "pulp"]),
    default="ortools",
    help="ortools (HiGHS), or pulp (CBC), which checks it.",
)
@click.option(
    "--time-limit",
    type=float,
    callback=options.positive,
    metavar="SECONDS",
    help="For the whole answer; for each child of several: --diverse, --finalists, --pairs, --rounds. Default: none.",
)
@click.option("--baseline", type=click.Choice(RULES), help="A simple rule in place of the optimum.")
@click.option("--explain", is_flag=True, help="Also say what 1 % more of each limit would buy.")
@click.option("--pareto", metavar="AXIS", help="Frontier against throughput, latency or memory.")
@click.option("--points", type=int, default=50, metavar="N", help="Of the frontier.")
@click.option("--diverse", type=int, metavar="N", help="N children that differ, each the best of the rest.")
@click.option("--min-distance", type=int, default=1, help="Layers in which they, or finalists, differ.")
@click.option("--finalists", type=int, metavar="N", help="Measure the KL of N near-optimal children, take the best.")
@click.option("--pairs", is_flag=True, help="Then fit interactions from them, and measure N more that these favour.")
@click.option("--rounds", type=int, metavar="N", help="Then score anew around the best, N times or until no gain.")
@options.held_out
@options.dry_run
@click.option(
    "--problem", type=options.PATH, help="A problem.json of your own, without a LIBRARY; solver/jsonio.py has its form."
)
@click.option("--out", type=options.PATH, help="Default: LIBRARY/solution, or solution.json.")
@options.as_json
def solve_command(
    library: Path | None,
    gpu: str | None,
    input_len: int,
    output_len: int,
    baseline: str | None,
    pareto: str | None,
    points: int,
    diverse: int | None,
    problem: Path | None,
    out: Path | None,
    hidden: tuple[int, ...] | None,
    depth: tuple[int, ...] | None,
    dry_run: bool,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Choose one variant per layer of LIBRARY: the least sum of scores within the goal.

    Needs neither a GPU nor torch, unless children are measured. Writes architecture.json; says what is reachable when the goal is not.

    \b
    Examples:
      puzzle solve lib --throughput 2x --gpu cpu --input-len 128 --output-len 128
      puzzle solve lib --throughput 1.5x --memory 60% --keep-attention 8 --gpu cpu --explain
      puzzle solve lib --throughput 2x --gpu h100 --engine vllm --memory 80GB
      puzzle solve lib --throughput 2x --gpu h100 --engine vllm --shapes llama-3.1-8b-fp8
      puzzle solve lib --throughput 2x --precision bf16,fp8 --gpu h100
      puzzle solve lib --latency 60% --gpu h100 --tp 8 --shapes llama-3.1-405b-fp8
      puzzle solve lib --pareto throughput --points 20 --gpu cpu --out frontier
      puzzle solve lib --throughput 2x --also 256/16@1:ttft=50% --gpu cpu
      puzzle solve lib --throughput 2x --fusion --fusion-dependency dependency.json --gpu cpu
      puzzle solve lib --throughput 2x --gpu cpu --diverse 5 --min-distance 4
      puzzle solve lib --throughput 2x --hidden 448,512 --depth 24,28 --gpu cpu     (see `puzzle slice`)
      puzzle solve lib --throughput 2x --gpu h100 --finalists 16 --pairs --rounds 3 --data corpus
      puzzle solve lib --throughput 2x --gpu h100 --rounds 3 --data corpus --memory-limit 40GB --dry-run
      puzzle solve --problem problem.json --out solution.json
    """
    if problem is not None:
        _solve_file(problem, out or Path("solution.json"), wanted["backend"], wanted["time_limit"], as_json)
        return
    if library is None:
        raise UserError("nothing to solve: name a LIBRARY (see `puzzle build-library`), or pass `problem` problem.json")
    if gpu is None:
        raise UserError("`gpu` is missing: say whose costs count, such as --gpu cpu (see `puzzle profile`)")
    from puzzle.choose.options import SolveOptions
    from puzzle.choose.points import points_of
    from puzzle.choose.precision import Precisions
    from puzzle.choose.problem import select
    from puzzle.choose.solve import solve_library
    from puzzle.library.manifest import Library
    from puzzle.measure.architecture import write_architecture

    held_out = {name: wanted.pop(name) for name in options.HELD_OUT}
    asked = SolveOptions(**{field.name: wanted.pop(field.name) for field in fields(SolveOptions)})
    asked.check()
    goal = GoalOptions(**wanted).goal(may_be_empty=bool(pareto or asked.also))
    opened = asked.shared(Library.open(library), gpu)
    sliced = None
    if hidden is not None or depth is not None:
        sliced = [one if one is opened else asked.shared(one, gpu) for one in points_of(opened, hidden, depth)]
    if screened := sum(len(one.screened(layer)) for one in sliced or [opened] for layer in one.layers):
        click.echo(
            f"{screened} blocks were screened out when the library was scored: no choice here has them", err=True
        )
    target = out or library / "solution"
    check_writable(target)
    costs = asked.costs(opened, gpu, asked.shapes)
    request = asked.request(opened, gpu, Workload(input_len=input_len, output_len=output_len), goal, baseline)
    if request.card is not None and "memory" not in goal.limits:
        click.echo(f"within the {gpu}'s {request.card / 1e9:g} GB; pass --memory for another limit", err=True)
    from puzzle.cli.report import print_diverse, print_frontier, print_prices, print_runs, print_solution

    if pareto is not None:
        assert not isinstance(costs, Precisions)
        from puzzle.choose.frontier import library_frontier

        selection = select(opened, costs, request, free=pareto == "throughput")
        with writing(target):
            rows = library_frontier(selection, pareto, points, target)
        options.print_json({"schema": 1, "axis": pareto, "points": rows}) if as_json else print_frontier(rows, pareto)
        click.echo(f"wrote {target / 'frontier.csv'}", err=True)
        return
    if diverse is not None:
        assert not isinstance(costs, Precisions)
        from puzzle.choose.solve import solve_diverse

        several = solve_diverse(opened, costs, request, diverse, asked.min_distance)
        written = {target / f"architecture-{number:02d}.json": one for number, one in enumerate(several, 1)}
        for path, one in written.items():
            write_architecture(path, one)
        for path in set(target.glob("architecture-*.json")) - set(written):  # of another question
            if path.stem.removeprefix("architecture-").isdigit():
                path.unlink()
        found = {"schema": 1, "solutions": [one.to_json() for one in several]}
        options.print_json(found) if as_json else print_diverse(several)
        click.echo(f"wrote {len(several)} architectures into {target}", err=True)
        return
    if asked.measures:
        from puzzle.cli.finalists import children_of, choose_measured

        assert not isinstance(costs, Precisions)
        selection = select(opened, costs, request)
        children = children_of(opened, **held_out)
        choose_measured(selection, asked, children, target, dry_run=dry_run, as_json=as_json)
        return
    solved = solve_library(opened, costs, request, None if sliced is None else asked.priced(sliced, gpu, costs))
    best = solved.best_point
    if out is None and best is not None:
        target = Path(best["library"]) / "solution"
    write_architecture(target / "architecture.json", solved)
    if as_json:
        options.print_json(solved.to_json())
    else:
        print_solution(solved)
        print_runs(solved)
        print_prices(solved)
        click.echo(f"wrote {target / 'architecture.json'}", err=True)
        if best is not None and solved.point is not None:
            click.echo(
                f"export it from its own library: puzzle export {best['library']} {target} --out CHILD", err=True
            )


def _solve_file(problem: Path, out: Path, backend: str, time_limit: float | None, as_json: bool) -> None:
    from puzzle.choose.problem_file import solve_file
    from puzzle.cli.report import print_solutions

    check_writable(out.parent)
    value = solve_file(problem, out, backend=backend, time_limit=time_limit)
    options.print_json(value) if as_json else print_solutions(value)
    click.echo(f"wrote {out}", err=True)
    if value["conflict"]:
        nearest = [f"{k} {v['side']} {v['value']:.6g}" for k, v in value["conflict"]["nearest"].items()]
        ways = f"; feasible with {', or '.join(nearest)}" if nearest else ""
        raise UserError(f"no solution: {' and '.join(value['conflict']['limits'])} cannot be met together{ways}")
