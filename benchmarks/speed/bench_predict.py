"""Does the sum of parts predict the whole? Random heterogeneous architectures, predicted from a cost table and measured.

Architectures have the layers of the named shapes, each with a random attention (any variant, or none) and FFN (any width, wide
ones as fusion makes them, linear, none); every fourth has a run of attention-free layers. Where the parent's own layers differ, or have
experts, every sub-block becomes one of what a profile offers in its place. Weights are random. A decode step is
the median of CUDA-graph replays at a fixed context; prefill likewise. The prediction is the table's sum of medians,
corrected by its whole parent as `solve` does it; nothing is fitted. Writes a row per point and, with --plot, a scatter plot; a point that does not fit in memory is left out. --fp8: weights
of sub-blocks and KV cache in fp8, against the table of the same name. --measured takes measured times from an earlier CSV and
needs no GPU.

    python benchmarks/speed/bench_predict.py --gpu h100 --shapes llama-3.1-8b --out benchmarks/results/predict.csv
    python benchmarks/speed/bench_predict.py --gpu h100 --shapes llama-3.1-8b --fp8 --count 8 \\
        --out benchmarks/results/predict_fp8.csv
"""

from __future__ import annotations

import contextlib
import csv
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.errors import UserError
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.blocklib.variant import default_names, variant_of
from puzzle.parents.known import known_structure
from puzzle.parents.structure import Structure
from puzzle.profile.cost_table import PACKAGED, CostTable, around, find_costs
from puzzle.profile.grid import OFFERED
from puzzle.profile.parts import ends_of
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import random_model
from step_times import decode_step_seconds, prefill_seconds

ATTENTION = ("parent", "kv4", "kv2", "kv1", "window-1024", "linear", "none")
FFN = ("parent", "0.75", "0.5", "0.25", "0.1", "linear", "none", "x2", "x4")


def architectures(parent: Structure, num_layers: int, count: int, seed: int) -> list[Structure]:
    """The parent first, then `count` random ones."""
    if not all(isinstance(layer["ffn"], SwiGLU) for layer in parent.layers):
        return mixed_architectures(parent.with_layers(parent.layers[:num_layers]), count, seed)
    names = [[{"attention": "parent", "ffn": "parent"}] * num_layers]
    chance = random.Random(seed)
    for number in range(count):
        attention = chance.sample(ATTENTION, chance.randint(2, len(ATTENTION)))
        ffn = chance.sample(FFN, chance.randint(2, 5))
        layers = [{"attention": chance.choice(attention), "ffn": chance.choice(ffn)} for _ in range(num_layers)]
        wide = [i for i, layer in enumerate(layers) if layer["ffn"].startswith("x")]
        for i in wide[4:]:
            layers[i]["ffn"] = "parent"
        if number % 4 == 0:
            begin = chance.randrange(num_layers // 2)
            for layer in layers[begin : begin + num_layers // 3]:
                layer["attention"] = "none"
        names.append(layers)
    usual = parent.usual
    return [
        parent.with_layers([{slot: sub_block_of(usual[slot], name) for slot, name in layer.items()} for layer in one])
        for one in names
    ]


def mixed_architectures(parent: Structure, count: int, seed: int) -> list[Structure]:
    """The same of a parent whose layers are not all attention and SwiGLU; a child draws from some of what each may become."""
    chance = random.Random(seed)
    offered = {(slot, own): [own, *alternatives(slot, own)] for _, slot, own in parent}
    found = [parent]
    for _ in range(count):
        drawn = {
            place: chance.sample(some, chance.randint(min(2, len(some)), len(some))) for place, some in offered.items()
        }
        layers = [{slot: chance.choice(drawn[slot, own]) for slot, own in layer.items()} for layer in parent.layers]
        found.append(parent.with_layers(layers))
    return found


def alternatives(slot: str, own: SubBlock) -> list[SubBlock]:
    """What a profile offers in its place."""
    found: dict[SubBlock, None] = {}
    for name in (*default_names(own), *OFFERED):
        with contextlib.suppress(UserError):  # the name does not fit this sub-block
            found[variant_of(own, name, slot).sub_block] = None
    return [sub_block for sub_block in found if sub_block != own]


def sub_block_of(parent: SubBlock, name: str) -> SubBlock:
    """A variant of the parent's, or "x2": an FFN of twice its width."""
    if name.startswith("x"):
        assert isinstance(parent, SwiGLU)
        return replace(parent, intermediate_size=int(name[1:]) * parent.intermediate_size)
    return variant_of(parent, name).sub_block


def predicted_seconds(
    costs: CostTable, parent: Structure, structure: Structure, phase: str, batch: int, context: int
) -> float:
    """The sum of all parts as the whole parent corrects it, which is what `solve` promises; between measured batches a decode step is
    linear."""
    low, high = around(costs.batches, batch) if phase == "decode" else (batch, batch)
    if low < high:
        less, more = (predicted_seconds(costs, parent, structure, phase, b, context) for b in (low, high))
        return less + (more - less) * (batch - low) / (high - low)
    if phase == "decode":
        between = costs.between_parts(parent, batch)
        running = [sub_block for _, _, sub_block in structure if not isinstance(sub_block, NoOp)]
        seconds = sum(max(0.0, costs.seconds(one, phase, batch, context) + between) for one in running)
        return seconds + sum(costs.seconds(end, phase, batch, context) for end in ends_of(structure))
    parts = [*(sub_block for _, _, sub_block in structure), *ends_of(structure)]
    factor = costs.whole_over_parts(parent, phase, batch, context)
    return factor * sum(costs.seconds(part, phase, batch, context) for part in parts)


@click.command()
@click.option("--gpu", required=True)
@click.option("--shapes", "name", default="llama-3.1-8b")
@click.option("--table", type=click.Path(path_type=Path), default=None)
@click.option("--count", default=24)
@click.option("--num-layers", default=None, type=int)
@click.option("--batches", default="1,16,64,256")
@click.option("--contexts", default="512,2048")
@click.option("--prompts", default="1x2048,16x512")
@click.option("--device", default="cuda")
@click.option("--seed", default=0)
@click.option("--fp8", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--plot", type=click.Path(path_type=Path), default=None)
@click.option("--measured", type=click.Path(path_type=Path), default=None, help="Predict the points of this CSV again.")
def main(
    gpu, name, table, count, num_layers, batches, contexts, prompts, device, seed, fp8, out, plot, measured
) -> None:
    parent = known_structure(name)
    children = architectures(parent, num_layers or parent.num_layers, count, seed)
    costs = CostTable(table) if table else find_costs(gpu, f"{name}-fp8" if fp8 else name, [PACKAGED])
    if measured:
        predict_again(measured, costs, children, out)
        if plot:
            draw(out, plot)
        return
    where, dtype = torch.device(device), torch.bfloat16 if device == "cuda" else torch.float32
    handle = open(out, "w", newline="")  # noqa: SIM115 (closed when the program ends)
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(
        ["architecture", "phase", "batch", "context", "predicted_s", "measured_s", "error", "device", "date"]
    )
    errors: dict[str, list[float]] = {"decode": [], "prefill": []}
    device_name = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    def add(number: int, phase: str, batch: int, context: int, measured: float) -> None:
        predicted = predicted_seconds(costs, parent, children[number], phase, batch, context)
        error = predicted / measured - 1
        errors[phase].append(abs(error))
        cells = [number, phase, batch, context, f"{predicted:.6g}", f"{measured:.6g}", f"{error:.4f}", device_name]
        writer.writerow([*cells, time.strftime("%Y-%m-%d")])
        handle.flush()

    for number, child in enumerate(children):
        model = random_model(child, where, dtype)
        for batch in map(int, batches.split(",")):
            for context in map(int, contexts.split(",")):
                with fitting(device):
                    seconds = decode_step_seconds(FastRuntime(model, batch, context + 1, fp8=fp8), context)
                    add(number, "decode", batch, context, seconds)
        for text in filter(None, prompts.split(",")):
            batch, length = map(int, text.split("x"))
            with fitting(device):
                seconds = prefill_seconds(FastRuntime(model, batch, length, fp8=fp8), length)
                add(number, "prefill", batch, length, seconds)
        summary = {
            p: f"mean {100 * sum(e) / len(e):.2f} % largest {100 * max(e):.2f} %" for p, e in errors.items() if e
        }
        print(number, summary, flush=True)
        del model
    if plot:
        draw(out, plot)


def predict_again(measured: Path, costs: CostTable, children: list[Structure], out: Path) -> None:
    """The rows of an earlier run with the predictions of another table."""
    with open(measured, newline="") as handle:
        rows = list(csv.DictReader(handle))
    errors: dict[str, list[float]] = {}
    for row in rows:
        point = row["phase"], int(row["batch"]), int(row["context"])
        predicted = predicted_seconds(costs, children[0], children[int(row["architecture"])], *point)
        error = predicted / float(row["measured_s"]) - 1
        row |= {"predicted_s": f"{predicted:.6g}", "error": f"{error:.4f}"}
        errors.setdefault(row["phase"], []).append(abs(error))
    with open(out, "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for phase, found in errors.items():
        mean, largest = 100 * sum(found) / len(found), 100 * max(found)
        print(f"{phase}: {len(found)} points, mean {mean:.2f} % largest {largest:.2f} %")


@contextlib.contextmanager
def fitting(device: str) -> Iterator[None]:
    """Leaves out what does not fit in memory, and frees memory afterwards."""
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        yield
    if device == "cuda":
        torch.cuda.empty_cache()


def draw(path: Path, plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    figure, axes = pyplot.subplots(figsize=(5, 5))
    for phase, colour in (("decode", "tab:blue"), ("prefill", "tab:orange")):
        mine = [r for r in rows if r["phase"] == phase]
        x, y = ([1e3 * float(r[k]) for r in mine] for k in ("measured_s", "predicted_s"))
        axes.scatter(x, y, s=9, color=colour, alpha=0.6, label=f"{phase}, {len(mine)} points")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="black", linewidth=0.6)
    axes.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms", title=rows[0]["device"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=120)


if __name__ == "__main__":
    main()
