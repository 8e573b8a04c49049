"""The true KL of children of a parent with experts: the MIP's beside those of uniform pruning, under one goal from one scored library.

Uniform rules choose one variant for all layers that are alike in the parent: "experts" among numbers of experts alone, kept by
router-weighted output norm (as REAP, arXiv 2510.13999), "width" among their widths alone, "uniform" among everything. Each takes, of all
that meet the goal at any measured batch size, the one with the least sum of scores. A rule that cannot meet the goal is left out, which is printed. With --children every child is also
written as a checkpoint, for `puzzle heal` and `puzzle evaluate`.

    python benchmarks/quality/bench_mixtures.py --library lib --data corpus.jsonl --gpu h100 --goal params=75% \\
        --goal throughput=1.2x --children children --out benchmarks/results/mixtures.csv
"""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.workload import Workload
from puzzle.blocklib.variant import PARENT
from puzzle.choose.goal import GoalOptions
from puzzle.choose.problem import Request, Selection, layer_label, select
from puzzle.choose.solve import open_costs
from puzzle.data.packing import load_tokens
from puzzle.export.card import plain_card
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_library
from puzzle.library.assemble import assemble, open_parent
from puzzle.library.manifest import Library
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model
from puzzle.solver.solve import solve

Choice = dict[str, str]
RULES: dict[str, Callable[[str], bool]] = {  # which variants, beside the parent's
    "experts": lambda name: name.startswith("experts=") and "-" not in name,
    "width": lambda name: name.startswith("width=") and "-" not in name,
    "uniform": lambda name: True,
}


def uniform_choices(selection: Selection, allowed: Callable[[str], bool]) -> Iterator[Choice]:
    """One cell for all layers that are alike in the parent, in all combinations."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, layer in enumerate(selection.library.structure.layers):
        alike.setdefault(tuple(layer.items()), []).append(index)
    kept = [
        [
            name
            for name, cell in selection.cells[where[0]].items()
            if all(v == PARENT or allowed(v) for v in cell.variants.values())
        ]
        for where in alike.values()
    ]
    for names in itertools.product(*kept):
        yield {layer_label(i): name for where, name in zip(alike.values(), names, strict=True) for i in where}


def best_uniform(selection: Selection, rule: str) -> tuple[float, int, Choice] | None:
    """(sum of scores, batch, choice); None where nothing meets the goal."""
    choices, found = list(uniform_choices(selection, RULES[rule])), []
    for batch in selection.batches:
        problem = selection.problem(batch)
        met = ((problem.totals(c)["score"], batch, c) for c in choices if not problem.violated(c))
        found += [best] if (best := min(met, key=lambda one: one[0], default=None)) else []
    return min(found, key=lambda one: one[0], default=None)


def best_of_all(selection: Selection) -> tuple[float, int, Choice] | None:
    solved = [
        (solution.objective, b, solution.choice)
        for b in selection.batches
        if (solution := solve(selection.problem(b))).choice
    ]
    return min(solved, key=lambda one: one[0], default=None)


@click.command()
@click.option("--library", "root", type=click.Path(path_type=Path), required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--gpu", default="cpu", show_default=True)
@click.option(
    "--goal", "goals", multiple=True, required=True, help="LIMIT=VALUE, as `solve` takes it; each is a goal of its own."
)
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--children", type=click.Path(path_type=Path), default=None)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    root: Path,
    data: tuple[str, ...],
    gpu: str,
    goals: tuple[str, ...],
    sequences: int,
    seq_len: int,
    children: Path | None,
    out: Path,
) -> None:
    library = Library.open(root)
    opened, device = open_parent(library, None), pick_device("auto")
    model = load_model(opened, device=device, dtype=compute_dtype(device))
    tokens = load_tokens(
        list(data), opened.directory, seq_len=seq_len, num_train=1, num_validation=sequences
    ).validation
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(
            [
                "goal",
                "rule",
                "batch",
                "predicted_speedup",
                "parameters",
                "active_parameters",
                "sum_of_scores",
                "kl",
                "kl_stderr",
                "lm_loss",
                "child",
                "device",
                "date",
            ]
        )
        for text in goals:
            limit, _, value = text.partition("=")
            asked: dict[str, Any] = {limit: value}
            request = Request(work=Workload(input_len=128, output_len=128), goal=GoalOptions(**asked).goal())
            selection = select(library, open_costs(library, gpu, None), request)
            costs, own = selection.costs, selection.parent
            for rule in ("mip", *RULES):
                best = best_of_all(selection) if rule == "mip" else best_uniform(selection, rule)
                if best is None:
                    print(f"{text} {rule}: nothing meets the goal", flush=True)
                    continue
                total, batch, choice = best
                cells = [selection.cells[i][choice[layer_label(i)]] for i in range(len(selection.cells))]
                layers = [cell.variants for cell in cells]
                found = compare(model, assemble(library, layers, opened, model=model), tokens)
                child = child_of_library(library, layers, opened)
                speed = costs.predict([cell.sub_blocks for cell in cells], batch).tokens_per_second
                active = child.structure.num_parameters - sum(
                    b.num_parameters - b.active_parameters() for _, _, b in child.structure
                )
                if children is not None:
                    target = children / f"{limit}-{rule}"
                    write_hf(child, target, plain_card(child, None), force=True)
                row = (
                    text, rule, batch, f"{speed / own.tokens_per_second:.3f}", child.num_parameters, active, f"{float(total):.5f}",
                    f"{found['kl']:.5f}", f"{found['kl_stderr']:.5f}", f"{found['lm_loss']:.4f}",
                    " ".join("/".join(cell.variants.values()) for cell in cells), name, time.strftime("%Y-%m-%d"),
                )  # fmt: skip
                writer.writerow(row)
                handle.flush()
                print(*row[:10], flush=True)


if __name__ == "__main__":
    main()
