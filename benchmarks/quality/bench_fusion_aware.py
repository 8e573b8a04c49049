"""Solving for a fused child against fusing afterwards, at the same speed: the true KL of both.

Protocol: for each goal, `aware` is what `puzzle solve --fusion` (with the parent's dependency) chooses and fuses. `afterwards`
is solved at the same batch without knowing of fusion and then fused wherever neighbours without attention save time by the
same costs; its own goal is found by bisection. Both are assembled, fused with own norms, and KL(parent‖child) is measured on
the same held-out sequences.
    without --measure  `afterwards` has the least goal at which its fused child is predicted to be as fast as asked for
    with --measure     every fused child in question runs with its own weights (puzzle/runtime/fast.py): the prompt of a batch,
                       and a decode step at the workload's middle context times the steps, medians of replayed CUDA graphs.
                       The bisection follows this time. `afterwards` is the child with the least sum of scores of all
                       that were measured at most --within slower than `aware`; where that one is faster by more than
                       --within, `afterwards-slower` is the next slower child, so that both sides are known.
Columns of predictions are called predicted_…, those of timings measured_…; measured_over_aware is the time over `aware`'s.
The speed-ups, and goals, are over the parent at its best batch by prediction, or with --batches at the same batch; predicted
over predicted and measured over measured. Rows are written goal by goal; typed again, the command leaves out goals whose rows
are there (--force begins anew).

    puzzle fuse examples/parent --data TEXT --dependency-only --out dependency.json
    python benchmarks/quality/bench_fusion_aware.py --library runs/quickstart/library --dependency dependency.json --data TEXT \\
        --gpu h100 --engine vllm --goals 1.05x,1.1x,1.15x,1.2x,1.3x --csv benchmarks/results/fusion_aware.csv
    python benchmarks/quality/bench_fusion_aware.py --library LIBRARY --dependency dependency.json --data TEXT --gpu h100 --measure \\
        --batches 16,512 --goals 1.5x,2x,3x --csv benchmarks/results/fusion_aware_measured.csv
"""

from __future__ import annotations

import csv
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.choose.cells import Cell
from puzzle.choose.fusion import Fusion
from puzzle.choose.goal import Goal, Target
from puzzle.choose.problem import Request, Selection, select
from puzzle.choose.solve import architecture, open_costs, solve_library
from puzzle.data.packing import load_tokens
from puzzle.export.sources import child_of_library
from puzzle.export.walker import Walker
from puzzle.fuse.rewrite import fuse_layers, widths_of
from puzzle.fuse.runs import Rule, Run, choose_runs
from puzzle.library.assemble import open_parent
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Architecture, Prediction
from puzzle.parents.opened import HfModel
from puzzle.runtime.divergence import compare
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import CausalModel, load_model
from puzzle.solver.solve import solve
from step_times import decode_step_seconds, prefill_seconds

COLUMNS = (
    "goal,way,solved_for,predicted_speedup,batch,runs,num_layers,sum_of_scores,kl,kl_stderr,lm_loss,predicted_s,measured_s,"
    "measured_prefill_s,measured_decode_step_s,measured_speedup,measured_over_aware,costs,device,torch,date"
)
PREDICTED_STEPS, MEASURED_STEPS = 12, 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Seconds of one batch, measured: its prompts, one decode step, the whole workload."""

    prefill: float
    step: float
    whole: float


@dataclass(kw_only=True, slots=True)
class Fused:
    """An architecture with the runs that are fused; goal: what it was solved for. timed: where it was measured."""

    goal: float
    solved: Architecture
    runs: list[Run]
    seconds: float  # predicted
    timed: Timed | None = None

    @property
    def key(self) -> tuple:
        layers = tuple(tuple(layer.values()) for layer in self.solved.variants)
        return layers, tuple(self.runs), self.batch

    @property
    def batch(self) -> int:
        return self.solved.predicted.batch


class Bench:
    """The parent, its library and costs; children are solved, fused and measured here."""

    def __init__(
        self, library: Library, selection: Selection, fusion: Fusion, opened: HfModel, tokens: Tensor, device: str
    ):
        self.library, self.selection, self.fusion, self.opened = library, selection, fusion, opened
        self.device = pick_device(device)
        self.model = load_model(opened, device=self.device, dtype=compute_dtype(self.device))
        self.tokens = tokens
        self._timed: dict[tuple, Timed] = {}
        self._solved: dict[tuple, Fused] = {}

    @property
    def work(self) -> Workload:
        return self.selection.costs.work

    def parent(self, batch: int | None) -> Prediction:
        """What goals are multiples of: the parent at this batch, or at its best one."""
        layers = self.library.structure.layers
        return self.selection.parent if batch is None else self.selection.costs.predict(layers, batch)

    def _request(self, times: float, same_batch: bool, fusion: Fusion | None) -> Request:
        goal = Goal(limits={"throughput": Target(value=times, relative=True)})
        return Request(work=self.work, goal=goal, fusion=fusion, same_batch=same_batch)

    def aware(self, times: float, batch: int | None) -> Fused:
        """Raises UserError when no child is so fast."""
        request, table = self._request(times, batch is not None, self.fusion), self.selection.costs.table
        if batch is None:
            found = solve_library(self.library, table, request)
        else:
            selection = select(self.library, table, request)
            solution = solve(selection.problem(batch))
            if not solution.choice:
                raise UserError(f"no child is {times:g} times as fast at batch {batch}: lower --goals")
            found = architecture(selection, batch, solution)
        return Fused(goal=times, solved=found, runs=list(found.fuse or ()), seconds=found.predicted.latency_seconds)

    def afterwards(self, times: float, batch: int, same_batch: bool) -> Fused | None:
        """Solved for `times` without knowing of fusion, then fused where that saves time. None: out of reach."""
        key = (times, batch, same_batch)
        if key in self._solved:
            return self._solved[key]
        costs = self.selection.costs
        selection = select(self.library, costs.table, self._request(times, same_batch, None))
        solution = solve(selection.problem(batch))
        if not solution.choice:
            return None
        found, cells = architecture(selection, batch, solution), selection.chosen(solution)
        runs = self.saving_runs(cells, batch)
        change = self.fusion.change(runs, cells, costs, batch)
        seconds = costs.predict(found.sub_blocks, batch, change).latency_seconds
        self._solved[key] = Fused(goal=times, solved=found, runs=runs, seconds=seconds)
        return self._solved[key]

    def saving_runs(self, cells: list[Cell], batch: int) -> list[Run]:
        """Neighbours without attention, wherever making them one saves time."""
        free = [None if cell.lone_ffn is None else cell.lone_ffn.intermediate_size for cell in cells]
        runs = choose_runs(free, Rule(keep_last=False))
        return [r for r in runs if self.fusion.change([r], cells, self.selection.costs, batch)["seconds"] < 0]

    def child(self, fused: Fused) -> CausalModel:
        """In memory, on the parent's device and in its dtype."""
        child = child_of_library(self.library, fused.solved.variants, self.opened)
        assert all(widths_of(child)[layer] for run in fused.runs for layer in run)
        weight = self.model.embedding.weight
        smaller = fuse_layers(child, fused.runs)
        walker = Walker(smaller, self.tokens[:1], weight.device, weight.dtype)
        head = None if self.model.head is None else self.model.head.data
        norm = self.model.norm.weight.data
        found = CausalModel(smaller.structure, weight.data, [block for _, block in walker.blocks()], norm, head)
        return found.requires_grad_(False).eval()

    def time(self, model: CausalModel, batch: int, key: tuple) -> Timed:
        """The workload at this batch size; an architecture is measured once."""
        if key not in self._timed:
            work = self.work
            runtime = FastRuntime(model, batch, work.input_len + work.output_len)
            step = decode_step_seconds(runtime, work.input_len + work.output_len // 2)
            prefill = prefill_seconds(runtime, work.input_len)
            whole = prefill + (work.output_len - 1) * step
            self._timed[key] = Timed(prefill=prefill, step=step, whole=whole)
            print(f"  {len(model.blocks)} layers, batch {batch}: {whole:.5f} s measured", flush=True)
        return self._timed[key]

    def measure(self, fused: Fused) -> Timed:
        if fused.timed is None:
            known = self._timed.get(fused.key)
            fused.timed = known or self.time(self.child(fused), fused.batch, fused.key)
        return fused.timed


def bisected(call: Callable[[float], bool], low: float, high: float, steps: int) -> float:
    """The least goal found at which `call` says that the child is fast enough; `high` is one."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if call(middle) else (middle, high)
    return high


def as_predicted(bench: Bench, aware: Fused, times: float, at: int | None) -> list[tuple[str, Fused]]:
    """(way, child) of the child fused afterwards that is predicted to reach `times`. at: the batch that was asked for"""
    batch = aware.batch
    wanted = batch * bench.work.output_len / (times * bench.parent(at).tokens_per_second)

    def enough(goal: float) -> bool:
        found = bench.afterwards(goal, batch, at is not None)
        return found is None or found.seconds <= wanted

    found = bench.afterwards(bisected(enough, 1.0, times, PREDICTED_STEPS), batch, at is not None)
    if found is None:
        raise UserError("no child without fusion reaches this goal")
    return [("afterwards", found)]


def as_measured(bench: Bench, aware: Fused, times: float, at: int | None, within: float) -> list[tuple[str, Fused]]:
    """(way, child) of the children fused afterwards that are as fast as `aware`, or next to it on either side."""
    batch, slowest = aware.batch, bench.measure(aware).whole * (1 + within)
    seen: list[Fused] = []

    def enough(goal: float) -> bool:
        found = bench.afterwards(goal, batch, at is not None)
        if found is None:
            return True
        seen.append(found)
        return bench.measure(found).whole <= slowest

    high = 1.3 * times
    enough(high)
    bisected(enough, 1.0, high, MEASURED_STEPS)
    fast = [f for f in seen if bench.measure(f).whole <= slowest]
    slow = [f for f in seen if bench.measure(f).whole > slowest]
    ways = []
    if fast:
        best = min(fast, key=lambda f: f.solved.objective)
        ways.append(("afterwards", best))
        if bench.measure(best).whole >= bench.measure(aware).whole * (1 - within):
            slow = []
    if slow:
        ways.append(("afterwards-slower", min(slow, key=lambda f: bench.measure(f).whole)))
    return ways


@click.command()
@click.option("--library", "root", type=click.Path(path_type=Path), required=True)
@click.option("--dependency", type=click.Path(path_type=Path), required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--gpu", default="cpu", show_default=True)
@click.option("--shapes", default=None)
@click.option("--engine", default="puzzle", show_default=True)
@click.option("--goals", default="1.1x,1.2x,1.3x", show_default=True)
@click.option(
    "--batches", default=None, help="Goals are at each of these batches; default: the best one for each goal."
)
@click.option("--input-len", type=int, default=128, show_default=True)
@click.option("--output-len", type=int, default=128, show_default=True)
@click.option("--measure", is_flag=True, help="Equal measured time on this machine, not equal predicted speed.")
@click.option("--within", type=float, default=0.01, show_default=True, help="Times this close count as equal.")
@click.option("--parent", default=None)
@click.option("--sequences", type=int, default=32, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--force", is_flag=True, help="Measure again what --csv holds.")
@click.option("--csv", "table", type=click.Path(path_type=Path), default=Path("benchmarks/results/fusion_aware.csv"))
def main(
    root: Path,
    dependency: Path,
    data: tuple[str, ...],
    gpu: str,
    shapes: str | None,
    engine: str,
    goals: str,
    batches: str | None,
    input_len: int,
    output_len: int,
    measure: bool,
    within: float,
    parent: str | None,
    sequences: int,
    seq_len: int,
    device: str,
    force: bool,
    table: Path,
) -> None:
    library = Library.open(root)
    costs, work = open_costs(library, gpu, shapes, engine), Workload(input_len=input_len, output_len=output_len)
    selection = select(library, costs, Request(work=work, goal=Goal()))
    opened = open_parent(library, parent)
    tokens = load_tokens(
        list(data), opened.directory, seq_len=seq_len, num_train=1, num_validation=sequences
    ).validation
    bench = Bench(library, selection, Fusion.open(library, dependency), opened, tokens, device)
    where = torch.cuda.get_device_name() if bench.device.type == "cuda" else "cpu"
    rows: list[dict[str, Any]] = []
    if table.is_file() and not force:
        with open(table, newline="") as handle:
            rows = list(csv.DictReader(handle))

    def row_of(goal: float, at: int | None, way: str, fused: Fused, aware: Fused) -> dict[str, Any]:
        child, solved = bench.child(fused), fused.solved
        measured = compare(bench.model, child, tokens)
        batch, best = fused.batch, bench.parent(at)
        speedup = batch * work.output_len / fused.seconds / best.tokens_per_second
        timed: tuple = ("",) * 5
        if measure:
            own, theirs = bench.measure(fused), bench.measure(aware)
            intact = bench.time(bench.model, best.batch, ("parent", best.batch))
            times = (batch / own.whole) / (best.batch / intact.whole)
            timed = tuple(f"{t:.6g}" for t in (own.whole, own.prefill, own.step))
            timed += (f"{times:.4f}", f"{own.whole / theirs.whole:.4f}")
        row = (
            f"{goal:g}x",
            way,
            f"{fused.goal:.4f}x",
            f"{speedup:.4f}",
            batch,
            " ".join(f"{first}-{last}" for first, last in fused.runs),
            len(child.blocks),
            f"{solved.objective:.5f}",
            f"{measured['kl']:.5f}",
            f"{measured['kl_stderr']:.5f}",
            f"{measured['lm_loss']:.4f}",
            f"{fused.seconds:.6g}",
            *timed,
        )
        print(*row, flush=True)
        row = (*row, costs.device, where, torch.__version__, time.strftime("%Y-%m-%d"))
        return dict(zip(COLUMNS.split(","), row, strict=True))

    tried: list[int | None] = [None] if batches is None else [int(batch) for batch in batches.split(",")]
    for at, times in itertools.product(tried, (float(goal.removesuffix("x")) for goal in goals.split(","))):
        if any(row["goal"] == f"{times:g}x" and at in (None, int(row["batch"])) for row in rows):
            print(f"{times:g}x at batch {at or 'best'}: its rows are in {table}", flush=True)
            continue
        try:
            aware = bench.aware(times, at)
            ways = as_measured(bench, aware, times, at, within) if measure else as_predicted(bench, aware, times, at)
        except UserError as error:
            print(f"{times:g}x: {error}", flush=True)
            continue
        rows += [row_of(times, at, way, fused, aware) for way, fused in [("aware", aware), *ways]]
        table.parent.mkdir(parents=True, exist_ok=True)
        with open(table, "w", newline="") as handle:
            writer = csv.DictWriter(handle, COLUMNS.split(","), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
