"""The true KL of children of a parent with experts: the MIP's beside those of uniform pruning, under one goal from one scored library.

Uniform rules choose one variant for all layers that are alike in the parent: "experts" among numbers of experts alone, kept by
router-weighted output norm (as REAP, arXiv 2510.13999), "width" among their widths alone, "uniform" among everything. Each takes, of all
that meet the goal at any measured batch size, the one with the least sum of scores. "minitron" has nothing local: of the global points under
LIBRARY/points (`puzzle slice`, with a library without variants and a cost table each) that meet the goal, the one with the least KL. A rule
that cannot meet the goal is left out, which is printed. A goal is one or several limits of `solve`; --like VARIANT is one more: as fast, by
the cost table, as the child that has this variant in every mixture, and of no more parameters. With --children every child is also
written as a checkpoint; with --heal-tokens each is healed on so many tokens, --jobs of them at a time, and measured again. What is there of them is not
done again, and the table is written anew whenever a child is done.

    python benchmarks/quality/bench_mixtures.py --library lib --data corpus.jsonl --gpu h100 --goal params=75% \\
        --goal throughput=1.2x,params=90% --children children --out benchmarks/results/mixtures.csv
    benchmarks/gpu/mixtures.sh WORK road_moe heal_moe           # benchmarks/results/mixtures_moe.csv
    benchmarks/gpu/mixtures.sh WORK road_hybrid heal_hybrid     # benchmarks/results/mixtures_hybrid.csv
"""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.variant import PARENT
from puzzle.choose.cells import Cell
from puzzle.choose.goal import Goal, GoalOptions
from puzzle.choose.points import points_of
from puzzle.choose.problem import Request, Selection, layer_label, select
from puzzle.choose.solve import open_costs
from puzzle.data.packing import load_tokens
from puzzle.export.card import plain_card
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_library
from puzzle.library.assemble import assemble, open_parent
from puzzle.library.manifest import Library
from puzzle.parents.structure import Structure
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import CausalModel, load_model
from puzzle.solver.solve import solve

Choice = dict[str, str]
RULES: dict[str, Callable[[str], bool]] = {  # which variants, beside the parent's
    "experts": lambda name: name.startswith("experts=") and "-" not in name,
    "width": lambda name: name.startswith("width=") and "-" not in name,
    "uniform": lambda name: True,
}
COLUMNS = ("goal", "rule", "batch", "predicted_speedup", "parameters", "active_parameters", "sum_of_scores", "kl", "kl_stderr", "lm_loss",
           "parent_loss", "healed_tokens", "kl_healed", "kl_healed_stderr", "lm_loss_healed", "child", "device", "date")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """selection: of the library, or of a global point."""

    score: float
    batch: int
    choice: Choice
    selection: Selection

    @property
    def cells(self) -> list[Cell]:
        return [cells[self.choice[layer_label(i)]] for i, cells in enumerate(self.selection.cells)]

    @property
    def layers(self) -> list[dict[str, str]]:
        return [dict(cell.variants) for cell in self.cells]

    @property
    def tokens_per_second(self) -> float:
        return self.selection.costs.predict([cell.sub_blocks for cell in self.cells], self.batch).tokens_per_second

    @property
    def told(self) -> str:
        point = self.selection.library.point
        return " ".join("/".join(v.values()) for v in self.layers) if point is None else point.told


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


def least(found: Iterator[Found]) -> Found | None:
    return min(found, key=lambda one: one.score, default=None)


def best_uniform(selection: Selection, rule: str) -> Found | None:
    """None where nothing meets the goal."""
    choices = list(uniform_choices(selection, RULES[rule]))

    def every() -> Iterator[Found]:
        for batch in selection.batches:
            problem = selection.problem(batch)
            for choice in choices:
                if not problem.violated(choice):
                    score = float(problem.totals(choice)["score"])
                    yield Found(score=score, batch=batch, choice=choice, selection=selection)

    return least(every())


def best_of_all(selection: Selection) -> Found | None:
    solved = ((batch, solve(selection.problem(batch))) for batch in selection.batches)
    return least(
        Found(score=s.objective, batch=batch, choice=dict(s.choice), selection=selection)
        for batch, s in solved
        if s.choice
    )


def best_point(selection: Selection, points: list[Selection]) -> Found | None:
    """Of the global points, as they are."""

    def every() -> Iterator[Found]:
        for point in points:
            there = replace(point, request=selection.request)
            choice = {
                layer_label(i): next(n for n, c in cells.items() if c.is_parent) for i, cells in enumerate(there.cells)
            }
            for batch in there.batches:
                if not there.problem(batch).violated(choice):
                    yield Found(score=there.base, batch=batch, choice=choice, selection=there)

    return least(every())


def as_good_as(selection: Selection, variant: str) -> Goal:
    """The goal that the child with this variant in every mixture just meets, at its own best batch. Raises UserError where the library lacks it."""
    layers = []
    for index, (layer, cells) in enumerate(zip(selection.library.structure.layers, selection.cells, strict=True)):
        wanted = {slot: variant if isinstance(own, Moe) else PARENT for slot, own in layer.items()}
        cell = next((c for c in cells.values() if dict(c.variants) == wanted), None)
        if cell is None:
            raise UserError(f"--like {variant}: layer {index} of the library has none")
        layers.append(cell.sub_blocks)
    speed = max(selection.costs.predict(layers, batch).tokens_per_second for batch in selection.batches)
    parameters = selection.costs.predict(layers, selection.batches[0]).num_parameters
    return GoalOptions(throughput=f"{(1 - 1e-6) * speed:.6f}", params=str(parameters)).goal()  # type: ignore[call-arg]


def goal_of(text: str) -> Goal:
    """Of limits as `solve` takes them: params=75%,throughput=1.2x."""
    asked: dict[str, Any] = dict(part.split("=", 1) for part in text.split(","))
    return GoalOptions(**asked).goal()


def active_parameters(structure: Structure) -> int:
    return structure.num_parameters - sum(b.num_parameters - b.active_parameters() for _, _, b in structure)


class Table:
    """Rows by goal and rule, kept beside the children, so that the same command goes on."""

    def __init__(self, out: Path, kept: Path | None, asked: str):
        self.out, self.kept, self.asked = out, kept, asked
        self.rows: dict[str, dict[str, Any]] = {}
        if kept is not None and kept.is_file():
            before = json.loads(kept.read_text())
            self.rows = before["rows"] if before["asked"] == asked else {}
        self.write()

    def put(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = self.rows.get(key, {}) | row
        self.write()

    def write(self) -> None:
        if self.kept is not None:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            self.kept.write_text(json.dumps({"asked": self.asked, "rows": self.rows}))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with open(self.out, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in self.rows.values() if "rule" in row)


@click.command()
@click.option("--library", "root", type=click.Path(path_type=Path), required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--gpu", default="cpu", show_default=True)
@click.option("--goal", "goals", multiple=True, help="LIMIT=VALUE,…, as `solve` takes them; each is a goal of its own.")
@click.option("--like", multiple=True, metavar="VARIANT", help="As fast and as small as with this in every mixture.")
@click.option("--rules", default="mip,experts,width,uniform,minitron", show_default=True)
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--input-len", type=int, default=128, show_default=True)
@click.option("--output-len", type=int, default=128, show_default=True)
@click.option("--children", type=click.Path(path_type=Path), default=None)
@click.option("--heal-tokens", type=float, default=0, show_default=True)
@click.option("--heal-batch-size", type=int, default=32, show_default=True)
@click.option("--heal-lr", type=float, default=1e-3, show_default=True)
@click.option("--jobs", type=int, default=1, show_default=True, help="Healings at a time.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    root: Path, data: tuple[str, ...], gpu: str, goals: tuple[str, ...], like: tuple[str, ...], rules: str, sequences: int, seq_len: int,
    input_len: int, output_len: int, children: Path | None, heal_tokens: float, heal_batch_size: int, heal_lr: float, jobs: int, out: Path,
) -> None:  # fmt: skip
    if heal_tokens and children is None:
        raise UserError("--heal-tokens needs --children, where they lie")
    library = Library.open(root)
    opened, device = open_parent(library, None), pick_device("auto")
    model = load_model(opened, device=device, dtype=compute_dtype(device))
    tokens = load_tokens(
        list(data), opened.directory, seq_len=seq_len, num_train=1, num_validation=sequences
    ).validation
    told = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "date": time.strftime("%Y-%m-%d"),
    }
    asked = f"{root.resolve()} {library.fingerprint} {gpu} {goals} {like} {rules} {sequences} {seq_len} {input_len} {output_len}"
    table = Table(out, None if children is None else children / "rows.json", asked)
    measured: dict[str, dict[str, Any]] = {}

    def against_parent(child: CausalModel) -> dict[str, float]:
        return compare(model, child, tokens)

    def healed(key: str) -> Path:
        """In a process of its own, which goes on where it was; rows of one child share it."""
        child, target = Path(table.rows[key]["checkpoint"]), children / "healed" / Path(table.rows[key]["name"])  # type: ignore[operator]
        if not (target / "config.json").is_file():
            words = [
                "heal",
                child,
                "--teacher",
                opened.directory,
                *(w for one in data for w in ("--data", one)),
                "--out",
                target,
                "--tokens",
                int(heal_tokens),
                "--seq-len",
                seq_len,
                "--batch-size",
                heal_batch_size,
                "--lr",
                heal_lr,
                "--save-every",
                100,
                "--eval-every",
                0,
                "--validation-sequences",
                8,
                "--cosine-weight",
                0,
            ]  # fmt: skip; streams of other widths have no cosine
            subprocess.run([sys.executable, "-m", "puzzle.cli", *map(str, words)], check=True)
        return target

    work = Workload(input_len=input_len, output_len=output_len)
    costs = open_costs(library, gpu, None)
    anything = select(library, costs, Request(work=work, goal=GoalOptions(params="100%").goal()))  # type: ignore[call-arg]
    goal_by_text = {f"as {variant}": as_good_as(anything, variant) for variant in like}
    goal_by_text |= {text: goal_of(text) for text in goals}
    points = [anything.at_point(one, open_costs(one, gpu, None)) for one in points_of(library, None, None) if one.point]
    for text, goal in goal_by_text.items():
        selection = select(library, costs, Request(work=work, goal=goal))
        for rule in rules.split(","):
            key = f"{text} {rule}"
            if key in table.rows:
                continue
            if rule == "minitron":
                best = best_point(selection, points)
            else:
                best = best_of_all(selection) if rule == "mip" else best_uniform(selection, rule)
            if best is None:
                print(f"{key}: nothing meets the goal", flush=True)
                table.put(key, {})
                continue
            there = best.selection.library
            if there.point is None:
                child = child_of_library(library, best.layers, opened)
                structure, name = (
                    child.structure,
                    "-".join([text.replace("=", "").replace(" ", "-").replace(",", "-"), rule]),
                )
                checkpoint = None if children is None else children / name
                if checkpoint is not None:
                    write_hf(child, checkpoint, plain_card(child, None), force=True)
            else:
                sliced = open_parent(there, None)
                structure, checkpoint, name = sliced.structure, sliced.directory, f"point-{there.root.name}"
            if best.told not in measured:
                made = (
                    assemble(library, best.layers, opened, model=model)
                    if there.point is None
                    else load_model(sliced, device=device, dtype=compute_dtype(device))
                )
                same = next((row for row in table.rows.values() if row.get("child") == best.told), None)
                keep = (
                    {"name": name, "checkpoint": str(checkpoint)}
                    if same is None
                    else {n: same[n] for n in ("name", "checkpoint")}
                )
                measured[best.told] = {**against_parent(made), **keep}
            found = measured[best.told]
            row = {
                "goal": text, "rule": rule, "batch": best.batch, "sum_of_scores": f"{best.score:.5f}",
                "predicted_speedup": f"{best.tokens_per_second / selection.parent.tokens_per_second:.3f}",
                "parameters": structure.num_parameters, "active_parameters": active_parameters(structure),
                "kl": f"{found['kl']:.5f}", "kl_stderr": f"{found['kl_stderr']:.5f}", "lm_loss": f"{found['lm_loss']:.4f}",
                "parent_loss": f"{found['parent_loss']:.4f}",
                "child": best.told, "name": found["name"], "checkpoint": found["checkpoint"], **told,
            }  # fmt: skip
            table.put(key, row)
            print(*(row[name] for name in COLUMNS[:10]), flush=True)
    if not heal_tokens:
        return
    waiting: dict[str, list[str]] = {}  # by child, the rows that it has
    for key, row in table.rows.items():
        if "rule" in row and row.get("healed_tokens") != int(heal_tokens):
            waiting.setdefault(row["name"], []).append(key)
    failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(healed, keys[0]): keys for keys in waiting.values()}
        for done in as_completed(running):
            try:
                after = against_parent(load_model(done.result(), device=device, dtype=compute_dtype(device)))
            except (subprocess.CalledProcessError, UserError) as error:
                failed += 1
                print(f"{running[done][0]}: {error}", flush=True)
                continue
            for key in running[done]:
                table.put(key, {
                    "healed_tokens": int(heal_tokens), "kl_healed": f"{after['kl']:.5f}", "kl_healed_stderr": f"{after['kl_stderr']:.5f}",
                    "lm_loss_healed": f"{after['lm_loss']:.4f}",
                })  # fmt: skip
                print(key, "healed:", f"{after['kl']:.5f}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
