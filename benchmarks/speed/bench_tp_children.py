"""A parent and three children that GPUs of one host share, solved for latency: promised and measured.

Protocol: a library of the parent's shapes with made-up scores, the table of its shares as one GPU measures them, a child for each goal of
--goals (latency of a batch, of the parent's), and `puzzle bench` of parent and children with random weights. In two steps, in one folder WORK: without
torchrun the library, the table and the children, on one GPU; under torchrun what they deliver. All-reduces are of --costs, where `puzzle profile
--all-reduce` wrote them, else of the tables that ship.

    PYTHONPATH=. python benchmarks/speed/bench_tp_children.py WORK --tp N --gpu h100 --costs costs
    NCCL_NVLS_ENABLE=0 PYTHONPATH=. torchrun --nproc-per-node N benchmarks/speed/bench_tp_children.py WORK --tp N --gpu h100 --append \\
        --csv benchmarks/results/tp_children.csv                                                            # N = 2, 4
    PYTHONPATH=. python benchmarks/speed/bench_tp_children.py /tmp/x --tp 4 --small                          # rehearse on a CPU
    PYTHONPATH=. torchrun --nproc-per-node 4 benchmarks/speed/bench_tp_children.py /tmp/x --tp 4 --small --csv /tmp/x.csv
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from point_table import PointTable, Row
from puzzle.base.device import short_name
from puzzle.base.errors import UserError
from puzzle.base.files import write_json
from puzzle.base.machine import several
from puzzle.measure.architecture import Architecture, read_architecture
from puzzle.profile.parts import shared_name
from rank_steps import ending_all, versions_of
from synthetic_library import main as synthetic_library

COLUMNS = (
    "shapes,tp,goal,model,parameters_B,batch,input_len,output_len,precision,quantity,promised,measured,measured_over_promised,device,costs_device,"
    "all_reduces_of,versions,date"
)
POINT = ("shapes", "tp", "goal", "model", "batch", "input_len", "output_len", "precision", "quantity", "device")
QUANTITIES = ("latency_seconds", "ttft_seconds", "tpot_seconds", "tokens_per_second", "memory_bytes")
SMALL = {"shapes": "reference", "gpu": "cpu", "input_len": 16, "output_len": 8, "batch": 4}


def solve(
    work: Path,
    shapes: str,
    gpu: str,
    tp: int,
    goals: list[str],
    lengths: list[str],
    batch: int,
    costs: Path | None,
    grid: list[str],
) -> None:
    """The library, the table of its shares, and WORK/GOAL/architecture.json for every goal that can be reached."""
    library = work / "library"
    synthetic_library.main([shapes, str(library)], standalone_mode=False)
    if costs is not None:
        shutil.copytree(costs / "all_reduce", library / "costs" / "all_reduce", dirs_exist_ok=True)
    if gpu == "cpu":
        from made_up_costs import shares_of, write_gpu_table
        from puzzle.library.manifest import Library

        gpu = "h100"  # whose prices are made up
        write_gpu_table(
            shares_of(Library.open(library).shareable(tp)[0], tp), "bf16", f"{shapes}-tp{tp}", "h100-made-up"
        )
    else:
        table = library / "costs" / gpu / f"{shared_name(shapes, tp)}.csv"
        if not table.is_file() and puzzle("profile", library, "--gpu", gpu, "--tp", tp, *grid).wait() != 0:
            raise UserError("no table of the shares, and so no promise")
    asked = ("--gpu", gpu, "--tp", tp, "--concurrency", batch, *lengths)
    running = [puzzle("solve", library, "--latency", goal, *asked, "--out", folder(work, goal)) for goal in goals]
    if 0 not in [process.wait() for process in running]:
        raise UserError("no goal was reached")


def puzzle(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "puzzle", *map(str, arguments)])


def folder(work: Path, goal: str) -> Path:
    return work / f"latency-{goal.removesuffix('%')}"


def rows_of(shapes: str, goal: str, solved: Architecture, found: dict[str, Any], versions: str) -> Iterator[Row]:
    """Of what `bench` found of a child, and of the parent if that was measured too."""
    for who, told in (("parent", solved.parent_predicted), ("child", solved.predicted)):
        if who not in found:
            continue
        measured = found[who]["measured"]
        measured["latency_seconds"] = measured["ttft_seconds"] + measured["decode_seconds"]
        kept = found[who]["predicted"] is not None
        for quantity in QUANTITIES:
            got, promised = measured[quantity], getattr(told, quantity) if kept else None
            yield {
                "shapes": shapes,
                "tp": str(found["tp"]),
                "goal": "" if who == "parent" else f"latency {goal}",
                "model": who,
                "parameters_B": f"{told.num_parameters / 1e9:.3f}",
                "batch": str(measured["batch"]),
                "input_len": str(found["workload"]["input_len"]),
                "output_len": str(found["workload"]["output_len"]),
                "precision": str(found["precision"]),
                "quantity": quantity,
                "promised": "" if promised is None else f"{promised:.6g}",
                "measured": f"{got:.6g}",
                "measured_over_promised": "" if promised is None else f"{got / promised:.4f}",
                "device": found["device"],
                "costs_device": solved.costs["device"],
                "all_reduces_of": (solved.costs["all_reduce"] or {"device": ""})["device"],
                "versions": versions,
                "date": time.strftime("%Y-%m-%d"),
            }


def measure(
    work: Path, shapes: str, gpu: str, tp: int, goals: list[str], repeats: int, path: Path, append: bool, go_on: bool
) -> None:
    """What `puzzle bench` says of every child that was solved for, and of the parent once; rows come as they are measured. go_on: not of
    those that the CSV has."""
    from puzzle.measure.bench import bench
    from puzzle.runtime.parallel import joined

    reached = [goal for goal in goals if (folder(work, goal) / "architecture.json").is_file()]
    if not reached:
        raise UserError(f"{work} has no children: run this without torchrun first")
    with joined(tp, gpu) as (ranks, device):
        first = ranks is None or ranks.is_first
        table = PointTable(path, COLUMNS, POINT, append=append or go_on, writes=first)
        here = {"shapes": shapes, "tp": str(tp), "device": several(short_name(device), tp) if gpu != "cpu" else "cpu"}
        for number, goal in enumerate(reached):
            solved = read_architecture(folder(work, goal))
            if go_on and table.has(**here, goal=f"latency {goal}", batch=str(solved.predicted.batch)):
                continue
            begin = time.perf_counter()
            found = bench(folder(work, goal), gpu=gpu, tp=tp, with_parent=number == 0, repeats=repeats)
            if first:
                write_json(folder(work, goal) / "bench.json", found)
                print(f"  {goal}: {time.perf_counter() - begin:.1f} s", flush=True)
            for row in rows_of(shapes, goal, solved, found, versions_of(device, tp)):
                table.add(row)


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--tp", type=int, required=True, help="GPUs that share a model.")
@click.option("--gpu", default="h100", show_default=True, help="This machine's.")
@click.option("--shapes", default="llama-3.3-70b", show_default=True)
@click.option("--goals", default="75%,66%,58%", show_default=True, help="Latencies, of the parent's.")
@click.option("--batch", type=int, default=64, show_default=True, help="Requests at once.")
@click.option("--input-len", type=int, default=512, show_default=True)
@click.option("--output-len", type=int, default=256, show_default=True)
@click.option("--costs", type=click.Path(path_type=Path), help="costs/ with all-reduces of this machine.")
@click.option("--profile", "grid", default="", help="Options of `puzzle profile`, such as '--batches 1,64'.")
@click.option("--repeats", type=int, default=2, show_default=True)
@click.option("--small", is_flag=True, help="A tiny parent on a CPU, made-up prices, to rehearse.")
@click.option("--csv", "path", type=click.Path(path_type=Path), default=Path("benchmarks/results/tp_children.csv"))
@click.option("--append", is_flag=True, help="Keep the rows that are in the CSV.")
@click.option("--go-on", is_flag=True, help="And do not measure their points again.")
def main(
    work: Path,
    tp: int,
    goals: str,
    costs: Path | None,
    grid: str,
    repeats: int,
    small: bool,
    path: Path,
    append: bool,
    go_on: bool,
    **sizes: Any,
) -> None:
    sizes |= SMALL if small else {}
    shapes, gpu, wanted = sizes["shapes"], sizes["gpu"], goals.split(",")
    with ending_all():
        if os.environ.get("WORLD_SIZE", "1") != "1":
            measure(work, shapes, gpu, tp, wanted, repeats, path, append, go_on)
        else:
            lengths = ["--input-len", str(sizes["input_len"]), "--output-len", str(sizes["output_len"])]
            solve(work, shapes, gpu, tp, wanted, lengths, sizes["batch"], costs, grid.split())


if __name__ == "__main__":
    main()
