"""The true KL of children chosen in different ways from one scored library, under the same throughput goal.

Protocol: the MIP, the best uniform child (one variant pair in all layers) and the greedy child (Puzzle's rule: the
budget split equally over the layers) may each use the batch size where their sum of scores is least; the 20 random
feasible children use the MIP's. Every child is assembled and its KL(parent‖child) measured on the same held-out
sequences. Reported beside it: the sum of replace-one-block scores, which is what all of them minimise or ignore.

    puzzle profile runs/bld --gpu cpu --batches 1,16,64
    python benchmarks/solver/bench_baselines.py --library runs/bld --data /usr/lib/python3.11 --sequences 32 \\
        --out benchmarks/results/baselines.csv
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import click
import torch

from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.workload import Workload
from puzzle.choose.goal import GoalOptions
from puzzle.choose.problem import Request, select
from puzzle.choose.solve import open_costs
from puzzle.data.packing import load_tokens
from puzzle.library.assemble import assemble, open_parent
from puzzle.library.manifest import Library
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model
from puzzle.solver.baselines import greedy, random_feasible, uniform
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve


@click.command()
@click.option("--library", "root", type=click.Path(path_type=Path), required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--parent", default=None)
@click.option("--gpu", default="cpu", show_default=True)
@click.option("--throughput", default="2x", show_default=True)
@click.option("--num-random", type=int, default=20, show_default=True)
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
def main(
    root: Path,
    data: tuple[str, ...],
    out: Path,
    parent: str | None,
    gpu: str,
    throughput: str,
    num_random: int,
    sequences: int,
    seq_len: int,
) -> None:
    library = Library.open(root)
    asked: dict[str, Any] = {"throughput": throughput}
    work, goal = Workload(input_len=128, output_len=128), GoalOptions(**asked).goal()
    selection = select(library, open_costs(library, gpu, None), Request(work=work, goal=goal))
    costs, own = selection.costs, selection.parent
    problems = {b: selection.problem(b) for b in costs.batches}

    def best(choose) -> tuple[int, Solution]:
        found = {b: choose(problem) for b, problem in problems.items()}
        batch = min(found, key=lambda b: found[b].objective)
        return batch, found[batch]

    chosen = {"mip": best(solve), "uniform": best(uniform), "greedy": best(greedy)}
    batch = chosen["mip"][0]
    for number, solution in enumerate(random_feasible(problems[batch], num_random), 1):
        chosen[f"random-{number:02d}"] = batch, solution

    opened, device = open_parent(library, parent), pick_device("auto")
    model = load_model(opened, device=device, dtype=compute_dtype(device))
    tokens = load_tokens(
        list(data), opened.directory, seq_len=seq_len, num_train=1, num_validation=sequences
    ).validation
    out.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(
            [
                "choice",
                "status",
                "batch",
                "predicted_speedup",
                "sum_of_scores",
                "kl",
                "kl_stderr",
                "lm_loss",
                "top1_agreement",
                "num_tokens",
                "costs_device",
                "device",
                "torch",
                "date",
            ]
        )
        for label, (at, solution) in chosen.items():
            if not solution.choice:
                print(f"{label}: {solution.status}", flush=True)
                continue
            cells = selection.chosen(solution)
            child = assemble(library, [cell.variants for cell in cells], opened, model=model)
            found = compare(model, child, tokens)
            row = (
                label,
                solution.status,
                at,
                f"{costs.predict([cell.sub_blocks for cell in cells], at).tokens_per_second / own.tokens_per_second:.3f}",
                f"{solution.objective:.5f}",
                f"{found['kl']:.5f}",
                f"{found['kl_stderr']:.5f}",
                f"{found['lm_loss']:.4f}",
                f"{found['top1_agreement']:.4f}",
                found["num_tokens"],
                costs.table.device,
                name,
                torch.__version__,
                time.strftime("%Y-%m-%d"),
            )
            writer.writerow(row)
            handle.flush()
            print(*row[:9], flush=True)


if __name__ == "__main__":
    main()
