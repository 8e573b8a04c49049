"""What it buys that precision is a choice: KL at equal speed and memory of children all in bf16, all in fp8, and free.

Protocol: the library's scores (with `puzzle score LIBRARY --fp8`) and the cost tables of one GPU; a limit on tokens/s, as a multiple of
the bf16 parent's at its best batch, and one on memory, as a share of its bytes there, the same for all three. Each child is put together
in memory as engines run it (weights, activations and cache rounded where they are in fp8) and KL(parent‖child) is measured on the
same held-out sequences. Where the GPU has no table in fp8 yet, `--like NAME` makes one of the bf16 one by the medians over sub-blocks
of a kind, at each batch, of NAME-fp8 over NAME: synthetic, and named so in the rows.

    puzzle profile LIBRARY --gpu h100 && puzzle profile LIBRARY --gpu h100 --fp8           # on the GPU
    python benchmarks/quality/bench_precision.py LIBRARY --gpu h100 --data DATA --out benchmarks/results/precision.csv
"""

from __future__ import annotations

import csv
import datetime
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.device import compute_dtype, name_of, pick_device
from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.fp8 import cache_in_fp8, weights_in_fp8
from puzzle.blocklib.plain.gqa import Attention
from puzzle.choose.goal import GoalOptions
from puzzle.choose.options import SolveOptions
from puzzle.choose.precision import Precisions
from puzzle.choose.problem import select
from puzzle.choose.solve import solve_library
from puzzle.data.packing import load_tokens
from puzzle.library.assemble import assemble, open_parent
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Architecture
from puzzle.profile.cost_table import PACKAGED, CostRow, CostTable, find_costs, write_costs
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import Block, CausalModel, load_model
from write_rows import write_rows

WAYS = ("bf16", "fp8", "bf16,fp8")


def rows_of(table: CostTable) -> list[dict[str, str]]:
    with open(table.path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def synthetic(library: Library, gpu: str, shapes: str, like: str) -> None:
    """Write the library's own NAME and NAME-fp8, the second one scaled."""
    table, *known = (find_costs(gpu, name, [PACKAGED]) for name in (shapes, like, f"{like}-fp8"))
    seconds = [
        {(r["part"], r["phase"], r["batch"], r["context"]): float(r["p50_s"]) for r in rows_of(t)} for t in known
    ]
    ratios: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for key, value in seconds[0].items():
        if value and seconds[1].get(key):
            for group in ((key[0].split()[0], key[1], key[2]), (key[0].split()[0], key[1])):
                ratios[group].append(seconds[1][key] / value)
    plain, quantised = [], []
    for row in rows_of(table):
        kind = row["part"].split()[0]
        scale = ratios.get((kind, row["phase"], row["batch"])) or ratios.get((kind, row["phase"])) or [1.0]
        values: dict = dict(row) | {k: int(row[k]) for k in ("batch", "context", "num_samples", "workspace_bytes")}
        values |= {k: float(row[k]) for k in ("p20_s", "p50_s", "p80_s")}
        plain.append(CostRow(**values))
        scaled = {k: float(values[k]) * median(scale) for k in ("p20_s", "p50_s", "p80_s")}
        quantised.append(replace(plain[-1], precision="fp8", **scaled))  # type: ignore[arg-type]
    for name, rows in ((shapes, plain), (f"{shapes}-fp8", quantised)):
        write_costs(library.root / "costs" / table.path.parent.name / f"{name}.csv", rows)


def as_served(child: CausalModel, solved: Architecture) -> CausalModel:
    """With everything rounded that is in fp8."""
    for index, block in enumerate(child.blocks):
        parts = block.parts()  # type: ignore[operator]
        for slot, part in parts.items():
            if (index, slot) in solved.fp8_weights and part.sub_block.num_parameters:
                parts[slot] = weights_in_fp8(part)
            if solved.kv_dtype == "fp8" and isinstance(part, Attention):
                parts[slot] = cache_in_fp8(parts[slot])
        child.blocks[index] = Block(parts)
    return child


@click.command()
@click.argument("root", type=click.Path(path_type=Path), metavar="LIBRARY")
@click.option("--gpu", required=True)
@click.option("--shapes", help="Which of several cost tables.")
@click.option("--like", help="Make the table in fp8 by what this one and its -fp8 differ: synthetic.")
@click.option("--data", required=True, multiple=True)
@click.option("--parent", help="Where it is now.")
@click.option("--speeds", default="1.25,1.5,2,2.5", show_default=True)
@click.option("--memories", default="1,0.6", show_default=True)
@click.option("--input-len", type=int, default=128, show_default=True)
@click.option("--output-len", type=int, default=128, show_default=True)
@click.option("--sequences", type=int, default=16, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@torch.no_grad()
def main(root: Path, gpu: str, shapes: str | None, like: str | None, data: tuple[str, ...], parent: str | None, speeds: str, memories: str, input_len: int, output_len: int, sequences: int, device: str, out: Path) -> None:  # fmt: skip
    library, work, on = Library.open(root), Workload(input_len=input_len, output_len=output_len), pick_device(device)
    if like is not None:
        synthetic(library, gpu, shapes or "", like)
    opened = open_parent(library, parent)
    length = library.facts["data"]["seq_len"]
    tokens = load_tokens(
        list(data), opened.directory, seq_len=length, num_train=1, num_validation=sequences, seed=library.facts["seed"]
    )
    whole = load_model(opened, device=on, dtype=compute_dtype(on))
    costs = {way: SolveOptions(precision=way).costs(library, gpu, shapes) for way in WAYS}
    usual = costs["bf16"]
    assert isinstance(usual, Precisions)
    request = SolveOptions().request(library, gpu, work, GoalOptions(throughput="1x").goal())  # type: ignore[call-arg]
    best = select(library, usual.ways[0], request).parent
    rows = []
    for speed, memory, way in product(map(float, speeds.split(",")), map(float, memories.split(",")), WAYS):
        limits = {"throughput": f"{speed * best.tokens_per_second:.6g}", "memory": str(int(memory * best.memory_bytes))}
        row = {
            "library": library.name,
            "tables": f"synthetic, like {like}" if like else "measured",
            "speed": speed,
            "memory": memory,
        }
        row |= {
            "precision": way,
            "sum_of_scores": "",
            "kl": "",
            "kl_stderr": "",
            "speedup": "",
            "gigabytes": "",
            "batch": "",
        }
        row |= {"fp8_attention": "", "fp8_ffn": "", "cache": "", "replaced": ""}
        try:
            goal = GoalOptions(**limits).goal()  # type: ignore[arg-type]
            solved = solve_library(library, costs[way], SolveOptions().request(library, gpu, work, goal))
        except UserError as error:
            print(speed, memory, way, error, file=sys.stderr)
        else:
            child = as_served(assemble(library, solved.variants, opened, model=whole), solved)
            found, predicted = compare(whole, child, tokens.validation), solved.predicted
            quantised = [solved.layers[layer][slot].sub_block for layer, slot in solved.fp8_weights]
            row |= {
                "sum_of_scores": f"{solved.objective:.5f}",
                "kl": f"{found['kl']:.5f}",
                "kl_stderr": f"{found['kl_stderr']:.5f}",
                "speedup": f"{predicted.tokens_per_second / best.tokens_per_second:.3f}",
                "gigabytes": f"{predicted.memory_bytes / 1e9:.4f}",
                "batch": predicted.batch,
                "fp8_attention": sum(isinstance(b, Gqa) for b in quantised),
                "fp8_ffn": sum(not isinstance(b, Gqa) and b.num_parameters > 0 for b in quantised),
                "cache": solved.kv_dtype,
                "replaced": sum(name != "parent" for layer in solved.variants for name in layer.values()),
            }
        rows.append(row | {"device": name_of(on), "date": datetime.date.today().isoformat()})
        print(*rows[-1].values(), flush=True)
        write_rows(out, rows)


if __name__ == "__main__":
    main()
