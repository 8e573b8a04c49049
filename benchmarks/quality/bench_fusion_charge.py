"""What `puzzle solve --fusion` charges for fusing two FFNs, against what it does to the parent.

Protocol: in the intact parent, FFN i + 1 is given the input that it would have without FFN i, as if both ran in parallel;
everything else stays. KL(parent‖that) is measured on held-out sequences, and held against the charge: the relative error of
FFN i + 1 without FFN i (same sequences) times the score of leaving FFN i + 1 out, from the library.

    python benchmarks/quality/bench_fusion_charge.py --library runs/quickstart/library --data /usr/lib/python3.11 \\
        --csv benchmarks/results/fusion_charge.csv
"""

from __future__ import annotations

import csv
import statistics
import time
from pathlib import Path

import click
import torch

from puzzle.base.device import compute_dtype
from puzzle.choose.fusion import Fusion
from puzzle.export.sources import child_of_checkpoint
from puzzle.fuse.measure import measure_dependency
from puzzle.fuse.stage import open_walker
from puzzle.library.assemble import open_parent
from puzzle.library.manifest import Library
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import Block, load_model


@click.command()
@click.option("--library", "root", type=click.Path(path_type=Path), required=True)
@click.option("--data", required=True, multiple=True)
@click.option("--parent", default=None)
@click.option("--sequences", type=int, default=8, show_default=True)
@click.option("--seq-len", type=int, default=512, show_default=True)
@click.option("--csv", "table", type=click.Path(path_type=Path), default=Path("benchmarks/results/fusion_charge.csv"))
@torch.no_grad()
def main(root: Path, data: tuple[str, ...], parent: str | None, sequences: int, seq_len: int, table: Path) -> None:
    library = Library.open(root)
    opened = open_parent(library, parent)
    walker, facts = open_walker(child_of_checkpoint(opened), data, num_sequences=sequences, seq_len=seq_len)
    matrix = measure_dependency(walker, ffns=True)[1]
    assert matrix is not None
    fusion = Fusion(library, matrix.relative_error)
    model = load_model(opened, device=walker.device, dtype=compute_dtype(walker.device))
    blocks: list[Block] = list(model.blocks)  # type: ignore[arg-type]
    meters = [Divergence() for _ in blocks[1:]]
    for ids in walker.ids:
        streams = [model.embed(ids)]
        for block in blocks:
            streams.append(block(streams[-1], walker.ropes))
        for i, meter in enumerate(meters):
            mixes, _ = blocks[i].parts().values()
            next_mixes, next_ffn = blocks[i + 1].parts().values()
            without = next_mixes.add(mixes.add(streams[i], walker.ropes), walker.ropes)
            x = next_mixes.add(streams[i + 1], walker.ropes) + next_ffn(without, walker.ropes)
            for later in blocks[i + 2 :]:
                x = later(x, walker.ropes)
            meter.add(model, streams[-1], model, x, ids)
    table.parent.mkdir(parents=True, exist_ok=True)
    ratios = []
    with open(table, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(
            [
                "ffn",
                "beside",
                "dependency",
                "relative_error",
                "charge",
                "kl",
                "kl_stderr",
                "num_tokens",
                "device",
                "versions",
                "date",
            ]
        )
        for i, meter in enumerate(meters):
            found, charge = meter.result(), fusion.charge(i, i + 1)
            ratios.append(charge / found["kl"])
            row = (
                i + 1,
                i,
                f"{matrix.dependency[i][i + 1] or 0:.4f}",
                f"{matrix.relative_error[i][i + 1] or 0:.4f}",
                f"{charge:.5f}",
                f"{found['kl']:.5f}",
                f"{found['kl_stderr']:.5f}",
            )
            writer.writerow((*row, found["num_tokens"], facts["device"], facts["versions"], time.strftime("%Y-%m-%d")))
            print(*row)
    print(f"charge over KL: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
