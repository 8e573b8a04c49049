"""What fusing attention-free layers costs in quality, on the reference parent, before any healing.

Protocol: from a scored and profiled library of the parent, the child with the least sum of scores that reaches --throughput
and has two stretches of four neighbouring layers without attention (every pair of stretches is tried; where none with attention
on both of its sides reaches the goal, stretches may be longer). --throughput is of the parent at its best batch, and the child
serves that batch too unless --batch says otherwise. Five children of it are written to --out, and KL(parent‖child) and loss of
each measured on the same held-out sequences:
    unfused    the child as solved
    own        both stretches fused without their last FFN, each FFN through its own norm
    last       the same through the norm of the run's last layer (arXiv 2503.18908)
    removed    as many layers as `own`: of each run one FFN stays, whichever leaves the least KL on these sequences
    with-last  fused with the last FFN of each stretch, own norms: two layers fewer than `own`
dependency: the largest dependency of one FFN of a run on an earlier one, over all runs. `benchmarks/quality/bench_heal.py --child …
--child …` heals them.

    puzzle run examples/quickstart.yaml --data /usr/lib/python3.11 --out runs/quickstart
    python benchmarks/quality/bench_fusion.py --library runs/quickstart/library --data /usr/lib/python3.11 --out runs/fusion \\
        --csv benchmarks/results/fusion.csv
    python benchmarks/quality/bench_fusion.py --library LIBRARY --gpu h100 --data corpus.jsonl --out fusion     # priced for an H100
"""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.workload import Workload
from puzzle.blocklib.none import NoOp
from puzzle.choose.cells import Cell
from puzzle.choose.goal import GoalOptions
from puzzle.choose.problem import Request, Selection, layer_label, select
from puzzle.choose.solve import architecture, open_costs
from puzzle.data.packing import load_tokens
from puzzle.export.card import plain_card
from puzzle.export.child import Child
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import export, open_source
from puzzle.fuse.matrix import Dependency
from puzzle.fuse.measure import measure_dependency
from puzzle.fuse.rewrite import remove_layers, widths_of
from puzzle.fuse.runs import Rule, choose_runs, members, worst
from puzzle.fuse.stage import fuse_child, open_walker
from puzzle.library.manifest import Library
from puzzle.measure.architecture import write_architecture
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import CausalModel, load_model
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve

LENGTH = 4
COLUMNS = (
    "child,norm,runs,num_layers,num_parameters,dependency,kl,kl_stderr,kl_to_unfused,lm_loss,top1_agreement,num_tokens"
)


@click.command()
@click.option("--library", "root", type=click.Path(path_type=Path), required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory for the five children.")
@click.option("--csv", "table", type=click.Path(path_type=Path), default=Path("benchmarks/results/fusion.csv"))
@click.option("--parent", default=None)
@click.option("--throughput", default="2x", show_default=True)
@click.option("--gpu", default="cpu", show_default=True, help="Whose costs count; text is read where this runs.")
@click.option("--shapes", "--costs-name", default=None, help="The cost table's name, where several would do.")
@click.option("--engine", default="puzzle", show_default=True)
@click.option("--input-len", type=int, default=128, show_default=True)
@click.option("--output-len", type=int, default=128, show_default=True)
@click.option("--batch", type=int, default=None, help="Default: the parent's best.")
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
def main(
    root: Path,
    data: tuple[str, ...],
    out: Path,
    table: Path,
    parent: str | None,
    throughput: str,
    gpu: str,
    shapes: str | None,
    engine: str,
    input_len: int,
    output_len: int,
    batch: int | None,
    sequences: int,
    seq_len: int,
) -> None:
    library = Library.open(root)
    asked: dict[str, Any] = {"throughput": throughput}
    work, goal = Workload(input_len=input_len, output_len=output_len), GoalOptions(**asked).goal()
    selection = select(library, open_costs(library, gpu, shapes, engine), Request(work=work, goal=goal))
    batch = batch or selection.parent.batch
    solution = two_stretches(selection, batch)
    solved = architecture(selection, batch, solution)
    write_architecture(out / "solution" / "architecture.json", solved)
    export(open_source(root, out / "solution", parent), out / "unfused", force=True)
    source = library.parent_source(parent)
    device = pick_device("auto")
    dtype = compute_dtype(device)
    opened = open_model(source)
    tokens = load_tokens(
        list(data), opened.directory, seq_len=seq_len, num_train=1, num_validation=sequences
    ).validation

    walker, facts = open_walker(child_of_checkpoint(out / "unfused"), data, seq_len=seq_len)
    layers, _ = measure_dependency(walker)
    dependency = Dependency(layers=layers, ffns=None, facts=facts)
    child = child_of_checkpoint(out / "unfused")
    widths = widths_of(child)
    matrix = layers.dependency
    runs = choose_runs(widths, Rule(keep_last=True))
    longer = choose_runs(widths, Rule(keep_last=False))
    print("runs", runs, "with the last FFN", longer, flush=True)
    fuse_child(out / "unfused", out / "own", runs, dependency=dependency, force=True)
    fuse_child(out / "unfused", out / "last", runs, norm="last", dependency=dependency, force=True)
    fuse_child(out / "unfused", out / "with-last", longer, dependency=dependency, force=True)

    model = load_model(opened, device=device, dtype=dtype)
    best: tuple[float, Child] | None = None
    for kept in itertools.product(*(members(run, widths) for run in runs)):
        gone = [layer for run in runs for layer in range(run[0], run[1] + 1) if layer not in kept]
        smaller = remove_layers(child, gone)
        write_hf(smaller, out / "removed", f"{plain_card(smaller, None)}\nLayers {gone} removed.\n", force=True)
        kl = compare(model, load_model(out / "removed", device=device, dtype=dtype), tokens[:16])["kl"]
        print("removed", gone, f"{kl:.4f}", flush=True)
        if best is None or kl < best[0]:
            best = kl, smaller
    assert best is not None
    card = f"{plain_card(best[1], None)}\nLayers removed, none fused.\n"
    write_hf(best[1], out / "removed", card, force=True)

    unfused = load_model(out / "unfused", device=device, dtype=dtype)
    rows = []
    for name, norm, fused in (
        ("unfused", "", []),
        ("own", "own", runs),
        ("last", "last", runs),
        ("removed", "", []),
        ("with-last", "own", longer),
    ):
        one = load_model(out / name, device=device, dtype=dtype)
        found = compare(model, one, tokens)
        row = (
            name,
            norm,
            " ".join(f"{first}-{last}" for first, last in fused),
            len(one.blocks),
            sum(tensor.numel() for _, tensor in one.named_weights()),
            f"{max(worst(run, widths, matrix) or 0.0 for run in fused):.4f}" if fused else "",
            f"{found['kl']:.5f}",
            f"{found['kl_stderr']:.5f}",
            f"{_between(unfused, one, tokens):.5f}",
            f"{found['lm_loss']:.4f}",
            f"{found['top1_agreement']:.4f}",
            found["num_tokens"],
        )
        rows.append(row)
        print(*row, flush=True)
    table.parent.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with open(table, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*COLUMNS.split(","), "predicted_speedup", "batch", "costs", "device", "torch", "date"])
        speedup = f"{solved.speedup:.3f}"
        for row in rows:
            promise = speedup if row[0] == "unfused" else ""
            priced = (promise, batch, selection.costs.table.device)
            writer.writerow((*row, *priced, where, torch.__version__, time.strftime("%Y-%m-%d")))


def _between(unfused: CausalModel, child: CausalModel, tokens: torch.Tensor) -> float:
    """KL(unfused‖child)"""
    return compare(unfused, child, tokens)["kl"]


def attends(cell: Cell) -> bool:
    """Whether it has an attention, or what stands in for one."""
    return not isinstance(cell.sub_blocks["attention"], NoOp)


def is_free(cell: Cell) -> bool:
    """An FFN and no attention."""
    return not attends(cell) and not isinstance(cell.sub_blocks["ffn"], NoOp)


def two_stretches(selection: Selection, batch: int) -> Solution:
    """The best child within the goal that has two stretches of LENGTH layers with an FFN and no attention."""
    problem = selection.problem(batch)
    count = len(problem.layers)

    def named(layer: int, wanted: Callable[[Cell], bool]) -> tuple[str, ...]:
        return tuple(name for name, cell in selection.cells[layer].items() if wanted(cell))

    for apart in (True, False):
        best: Solution | None = None
        for first in range(count - 2 * LENGTH):
            for second in range(first + LENGTH + 1, count - LENGTH + 1):
                inside = {*range(first, first + LENGTH), *range(second, second + LENGTH)}
                around = {first - 1, first + LENGTH, second - 1, second + LENGTH} & set(range(count))
                pins = {layer_label(i): named(i, is_free) for i in inside}
                pins |= {layer_label(i): named(i, attends) for i in around if apart}
                found = solve(replace(problem, pins=pins))
                if found.choice and (best is None or found.objective < best.objective):
                    best = found
        if best is not None:
            return best
    raise SystemExit(f"no child with two stretches of {LENGTH} layers without attention reaches the goal")


if __name__ == "__main__":
    main()
