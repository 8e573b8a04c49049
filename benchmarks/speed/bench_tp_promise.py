"""Is the promise of GPUs that share a model kept? Decode steps that `bench_fusion_latency.py` measured, beside what cost tables and all-reduces say.

Promised: the sum over a rank's parts of the shipped H100 table of these shapes, corrected as `solve` does it, and of as many all-reduces
as the row has, with those of embedding and head where the step had them (measured since 2026-11-28). All-reduces are those of the H100 where they
were measured (--costs), else of the H200. No table of these shapes on an H200 ships: without
one in --costs its rows are promised from the H100's times the ratio of the two cards' bandwidths (3.35 and 4.8 TB/s), which is computed, not
measured, and marked so. Needs no GPU.

    PYTHONPATH=. python benchmarks/speed/bench_tp_promise.py --measured benchmarks/results/fusion_latency.csv \\
        --measured benchmarks/results/fusion_latency_8xh200.csv \\
        --csv benchmarks/results/tp_promise.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import mean

import click

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from bench_fusion_latency import LAYERS, layers_of, share

from puzzle.base.machine import GPUS
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.known import known_structure
from puzzle.profile.all_reduce import find_all_reduces
from puzzle.profile.cost_table import PACKAGED, CostTable, find_costs
from puzzle.profile.parts import Part, ends_of, priced_as, shared_name
from result_tables import WITH_ENDS

COLUMNS = "shapes,ffn_of_attention_free,fusion,tp,batch,context,device,all_reduces_of,table_of,promised_s,measured_s,measured_over_promised"


def ffn_seconds(table: CostTable, part: SubBlock, batch: int) -> float:
    """Of a gated FFN between and beyond the widths that were measured, which fusion may make: linear in the width."""
    width = part.intermediate_size  # type: ignore[attr-defined]
    known = sorted(
        int(key.rpartition(" f")[2]) for key in table.parts() if key.startswith("swiglu") and key.count(" ") == 2
    )
    low = max((w for w in known[:-1] if w <= width), default=known[0])
    high = next(w for w in known if w > low)
    prefix = priced_as(part).rpartition(" f")[0]
    a, b = (table._known(f"{prefix} f{w}", "decode", batch)[0][1] for w in (low, high))
    return a + (b - a) * (width - low) / (high - low)


def promised(row: dict[str, str], table: CostTable, sums: float, bandwidth: float) -> float:
    """Seconds of a decode step. sums: of all its all-reduces; bandwidth: of the table's card over that of the row's."""
    whole, batch, context = known_structure(row["shapes"]), int(row["batch"]), int(row["context"])
    count, free = LAYERS[row["shapes"]]
    own = share(whole, row["shapes"], int(row["tp"]))
    fraction = float(row["ffn_of_attention_free"].removeprefix("x"))
    structure = own.with_layers(layers_of(own.layers[0], count, free, row["fusion"], fraction))
    parts: list[Part] = [b for _, _, b in structure if not isinstance(b, NoOp)]
    parent = own.with_layers([own.layers[0]] * whole.num_layers)
    between, seconds = table.between_parts(parent, batch), 0.0
    for part in parts:
        own_seconds = (
            ffn_seconds(table, part, batch)
            if isinstance(part, SubBlock) and part.kind == "swiglu"
            else table.seconds(part, "decode", batch, context)
        )
        seconds += max(0.0, own_seconds * bandwidth + between)
    ends = sum(table.seconds(end, "decode", batch, context) for end in ends_of(structure))
    return seconds + ends * bandwidth + sums


def table_of(card: str, name: str, roots: list[Path]) -> CostTable | None:
    """None where these shares were not measured on it."""
    try:
        return find_costs(card, name, roots)
    except ValueError:
        return None


@click.command()
@click.option("--measured", "paths", type=click.Path(path_type=Path), multiple=True, required=True)
@click.option(
    "--costs", type=click.Path(path_type=Path), help="costs/ with tables of one's own, before the shipped ones."
)
@click.option("--csv", "out", type=click.Path(path_type=Path))
def main(paths: tuple[Path, ...], costs: Path | None, out: Path | None) -> None:
    roots, rows = [*([] if costs is None else [costs]), PACKAGED], []
    for path in paths:
        with open(path, newline="", encoding="utf-8") as handle:
            measured = [row for row in csv.DictReader(handle) if row["shapes"] in LAYERS]
        for row in measured:
            gpu, tp = "h200" if "H200" in row["device"] else "h100", int(row["tp"])
            name = row["shapes"] if "-tp" in row["shapes"] else shared_name(row["shapes"], tp)
            table = next((t for card in (gpu, "h100") if (t := table_of(card, name, roots)) is not None), None)
            if table is None:
                continue
            sums, source = 0.0, "-"
            if tp > 1:
                found = find_all_reduces(gpu, tp, roots)
                width, source = known_structure(row["shapes"]).hidden_size, found.device
                each, batch = 2 * width, int(row["batch"])
                sums = int(row["all_reduces_per_token"]) * found.seconds(each * batch)
                if row["date"] >= WITH_ENDS:
                    sums += found.seconds(each * batch) + found.seconds(8 * tp * batch)
            bandwidth = 1.0 if gpu.upper() in table.device else GPUS["h100"].bandwidth / GPUS[gpu].bandwidth
            said = promised(row, table, sums, bandwidth)
            kept = {key: row[key] for key in COLUMNS.split(",") if key in row}
            rows.append(
                kept
                | {
                    "all_reduces_of": source,
                    "table_of": table.device + ("" if bandwidth == 1 else f" times {bandwidth:.3f}"),
                    "promised_s": f"{said:.6g}",
                    "measured_s": row["p50_s"],
                    "measured_over_promised": f"{float(row['p50_s']) / said:.4f}",
                }
            )
    for key in sorted({(r["device"], r["shapes"], int(r["tp"])) for r in rows}):
        errors = [
            float(r["measured_over_promised"]) - 1 for r in rows if (r["device"], r["shapes"], int(r["tp"])) == key
        ]
        told = f"mean |error| {100 * mean(map(abs, errors)):.2f} %, from {100 * min(errors):+.2f} to {100 * max(errors):+.2f} %"
        print(*key, f"{len(errors)} points: measured over promised - 1: {told}")
    if out is not None:
        with open(out, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS.split(","), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
