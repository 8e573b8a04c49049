"""Sweep the learning rate of block-local distillation.

Protocol: for every rate a fresh library of the given parent (all layers, default search space) is trained on the same
tokens; reported is, per variant, the median over layers of the normalised MSE on held-out sequences before and after.

    python benchmarks/quality/bench_bld_lr.py --parent examples/parent --data /usr/lib/python3.12 --out benchmarks/results/bld_lr.csv
"""

from __future__ import annotations

import csv
import tempfile
import time
from pathlib import Path

import click
import torch

from puzzle.cli.report import library_summary
from puzzle.library.build import BuildOptions, build_library


@click.command()
@click.option("--parent", required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--rates", default="3e-4,1e-3,3e-3,1e-2", show_default=True)
@click.option("--tokens", type=float, default=2e6, show_default=True)
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
def main(
    parent: str, data: tuple[str, ...], out: Path, rates: str, tokens: float, seq_len: int, batch_size: int
) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows = []
    for rate in (float(r) for r in rates.split(",")):
        with tempfile.TemporaryDirectory() as work:
            started = time.time()
            options = BuildOptions(
                data=list(data),
                out=Path(work) / "lib",
                tokens=int(tokens),
                seq_len=seq_len,
                batch_size=batch_size,
                lr=rate,
            )
            build_library(parent, options)
            seconds = time.time() - started
            for row in library_summary(options.out)["variants"]:
                losses = (f"{row[f'validation_loss_{when}']:.5f}" for when in ("before", "after"))
                facts = (int(tokens), f"{seconds:.1f}", device, torch.__version__, time.strftime("%Y-%m-%d"))
                rows.append((rate, row["slot"], row["variant"], *losses, *facts))
                print(*rows[-1], flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(
            ("lr", "kind", "variant", "nmse_before", "nmse_after", "tokens", "seconds", "device", "torch", "date")
        )
        writer.writerows(rows)


if __name__ == "__main__":
    main()
