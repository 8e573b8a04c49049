"""Solving for a fused child against fusing afterwards, at the same predicted speed: the true KL of both.

Protocol: for each goal, `aware` is what `puzzle solve --fusion` (with the parent's dependency) chooses and fuses. `afterwards`
is solved without knowing of fusion and then fused wherever neighbours without attention save time; its own goal is lowered by
bisection until the fused child just reaches the same speed. Both are assembled, fused with own norms, and KL(parent‖child) is
measured on the same held-out sequences. Speeds are predictions of the same costs (--gpu, --engine).

    puzzle fuse examples/parent --data TEXT --dependency-only --out dependency.json
    python benchmarks/bench_fusion_aware.py --library runs/quickstart/library --dependency dependency.json --data TEXT \
        --gpu h100 --engine vllm --goals 1.1x,1.2x,1.3x
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from puzzle.assemble import open_parent
from puzzle.build import compute_dtype, pick_device
from puzzle.costs import Workload
from puzzle.data import load_tokens
from puzzle.errors import UserError
from puzzle.export.child import child_of_library
from puzzle.families.family import HfModel
from puzzle.fuse.measure import Walker
from puzzle.fuse.price import Fusion
from puzzle.fuse.rewrite import fuse_layers, widths_of
from puzzle.fuse.runs import Rule, Run, choose_runs
from puzzle.goal import Goal, Target
from puzzle.library import Library
from puzzle.metrics import compare
from puzzle.model import CausalModel, load_model
from puzzle.predict import Choice, CostModel
from puzzle.solve import open_costs, selection_of, solve_library

COLUMNS = "goal,way,solved_for,predicted_speedup,batch,runs,num_layers,sum_of_scores,kl,kl_stderr,lm_loss,costs,device,torch,date"


def saving_runs(fusion: Fusion, costs: CostModel, layers: list[Choice], batch: int) -> list[Run]:
    """Neighbours without attention, wherever making them one saves time."""
    free = [fusion.width(f"{c['attention']}|{c['ffn']}") for c in layers]
    runs = choose_runs(free, Rule(keep_last=False))
    return [run for run in runs if fusion.change([run], layers, costs, batch)["seconds"] < 0]


@click.command()
@click.option("--library", "root", type=click.Path(path_type=Path), required=True)
@click.option("--dependency", type=click.Path(path_type=Path), required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--gpu", default="cpu", show_default=True)
@click.option("--shapes", default=None)
@click.option("--engine", default="puzzle", show_default=True)
@click.option("--goals", default="1.1x,1.2x,1.3x", show_default=True)
@click.option("--parent", default=None)
@click.option("--sequences", type=int, default=32, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@click.option("--csv", "table", type=click.Path(path_type=Path), default=Path("benchmarks/results/fusion_aware.csv"))
def main(
    root: Path,
    dependency: Path,
    data: tuple[str, ...],
    gpu: str,
    shapes: str | None,
    engine: str,
    goals: str,
    parent: str | None,
    sequences: int,
    seq_len: int,
    table: Path,
) -> None:
    library = Library.open(root)
    costs, work = open_costs(library, gpu, shapes, engine), Workload(input_len=128, output_len=128)
    fusion = Fusion.open(library, dependency)
    selection = selection_of(library, costs, work, Goal())
    opened, device = open_parent(library, parent), pick_device("auto")
    model = load_model(opened, device=device, dtype=compute_dtype(device))
    tokens = load_tokens(
        list(data), opened.directory, seq_len=seq_len, num_train=1, num_validation=sequences
    ).validation

    def solved(times: float, with_fusion: bool) -> dict[str, Any]:
        goal = Goal(throughput=Target(value=times, relative=True))
        return solve_library(library, costs, work, goal, fusion=fusion if with_fusion else None)

    def afterwards(times: float) -> tuple[list[Run], float, dict[str, Any]]:
        """(runs, speed-up once fused, architecture) when solved for `times` without knowing of fusion."""
        found = solved(times, False)
        batch, layers = found["predicted"]["batch"], found["layers"]
        runs = saving_runs(fusion, selection.costs, layers, batch)
        change = fusion.change(runs, layers, selection.costs, batch)
        speed = selection.costs.predict(layers, batch, change).tokens_per_second
        return runs, speed / selection.parent.tokens_per_second, found

    rows = []
    for times in (float(goal.removesuffix("x")) for goal in goals.split(",")):
        try:
            aware = solved(times, True)
            low, high = 1.0, times
            for _ in range(12):
                middle = (low + high) / 2
                low, high = (low, middle) if afterwards(middle)[1] >= times else (middle, high)
            runs, speed, found = afterwards(high)
        except UserError as error:
            print(f"{times:g}x: {error}", flush=True)
            continue
        ways = (
            ("aware", times, aware["predicted"]["speedup"], [tuple(run) for run in aware["fuse"]], aware),
            ("afterwards", high, speed, runs, found),
        )
        for way, own, reached, fused, architecture in ways:
            child = fused_model(library, architecture["layers"], fused, opened, model, tokens)
            measured = compare(model, child, tokens)
            row = (
                f"{times:g}x",
                way,
                f"{own:.4f}x",
                f"{reached:.4f}",
                architecture["predicted"]["batch"],
                " ".join(f"{first}-{last}" for first, last in fused),
                len(child.blocks),
                f"{architecture['objective']:.5f}",
                f"{measured['kl']:.5f}",
                f"{measured['kl_stderr']:.5f}",
                f"{measured['lm_loss']:.4f}",
            )
            rows.append((*row, costs.device, str(device), torch.__version__, time.strftime("%Y-%m-%d")))
            print(*row, flush=True)
    table.parent.mkdir(parents=True, exist_ok=True)
    with open(table, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(COLUMNS.split(","))
        writer.writerows(rows)


def fused_model(
    library: Library, layers: list[Choice], runs: list[Run], opened: HfModel, like: CausalModel, tokens: Tensor
) -> CausalModel:
    """The fused child in memory, on the parent's device and in its dtype."""
    child = child_of_library(library, layers, opened)
    assert all(widths_of(child)[layer] for run in runs for layer in run)
    weight = like.embedding.weight
    walker = Walker(fuse_layers(child, runs), opened.spec, tokens[:1], weight.device, weight.dtype)
    head = None if like.head is None else like.head.data
    found = CausalModel(like.spec, weight.data, list(walker.blocks()), like.norm.weight.data, head)
    return found.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
