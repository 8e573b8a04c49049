"""What block-local distillation buys: every variant before and after training, medians over the layers.

Protocol: the default search space of every layer of --parent is initialised (a library of 0 tokens) and trained on
--tokens tokens; both libraries are scored on the same held-out sequences. Reported per variant, median over layers:
normalised MSE of the sub-block's output on held-out text, and KL(parent‖child) when it alone replaces its parent
block. Where a slot has sub-blocks of several kinds in the parent, as attention and Mamba-2 of a hybrid, each has rows of its own. The trained
library stays in --library, the other one in --initial where that is given; what is there of them is not done again, and a build
that was cut off has no seconds.

    python benchmarks/quality/bench_bld.py --data /usr/lib/python3/dist-packages --library runs/bld --tokens 24e6 --lr 2e-3 \\
        --out benchmarks/results/bld.csv
    python benchmarks/quality/bench_bld.py --data /usr/lib/python3/dist-packages --library runs/bld-ffn --ffn 0.25,0.1 \\
        --attention parent --tokens 60e6 --out benchmarks/results/bld_ffn.csv
    benchmarks/gpu/mixtures.sh WORK road_moe        # benchmarks/results/bld_moe.csv
    benchmarks/gpu/mixtures.sh WORK road_hybrid     # benchmarks/results/bld_hybrid.csv
"""

from __future__ import annotations

import contextlib
import csv
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from puzzle.blocklib.variant import PARENT
from puzzle.library.build import BuildOptions, build_library
from puzzle.library.manifest import Library, score_name
from puzzle.library.score import ScoreOptions, score_library
from puzzle.library.store import BlockStore


def compared(begun: Path, ended: Path) -> list[tuple[object, ...]]:
    """A row for each variant, of the kind of sub-block that it replaces."""
    initial, trained = Library.open(begun), Library.open(ended)
    store, found = BlockStore(ended), dict[tuple[str, str, str], list[int]]()
    for layer in trained.layers:
        for slot, space in trained.spaces[layer].items():
            for variant in space:
                if variant != PARENT:
                    found.setdefault((slot, space[PARENT].kind, variant), []).append(layer)
    kinds = {slot: {kind for s, kind, _ in found if s == slot} for slot, _, _ in found}
    rows: list[tuple[object, ...]] = []
    for (slot, kind, variant), having in found.items():
        name = score_name({slot: variant})
        records = [store.record(layer, slot, variant) for layer in having]
        losses = [statistics.median(r[f"validation_loss_{when}"] for r in records) for when in ("before", "after")]
        before, after = ([one.scores(layer)[name]["kl"] for layer in having] for one in (initial, trained))
        first, last = statistics.median(before), statistics.median(after)
        rows.append((
            slot if len(kinds[slot]) == 1 else kind, variant, *(f"{loss:.5f}" for loss in losses), f"{first:.6f}", f"{last:.6f}",
            f"{1 - last / first if first else 0:.4f}", sum(a < b for a, b in zip(after, before, strict=True)), len(after),
        ))  # fmt: skip
    return rows


@click.command()
@click.option("--parent", default="examples/parent", show_default=True)
@click.option("--data", required=True, multiple=True)
@click.option("--library", type=click.Path(path_type=Path), required=True)
@click.option("--initial", type=click.Path(path_type=Path), help="Keep the library of 0 tokens here.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--attention", default=None, help="Default: the whole search space.")
@click.option("--ffn", default=None)
@click.option("--layers", default=None, help="Only these, e.g. 0-3,7. Default: all.")
@click.option("--tokens", type=float, default=20e6, show_default=True)
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--lr", type=float, default=3e-3, show_default=True)
@click.option("--score-sequences", type=int, default=64, show_default=True)
def main(
    parent: str,
    data: tuple[str, ...],
    library: Path,
    initial: Path | None,
    out: Path,
    attention: str | None,
    ffn: str | None,
    layers: str | None,
    tokens: float,
    seq_len: int,
    batch_size: int,
    lr: float,
    score_sequences: int,
) -> None:
    def built(root: Path, num_tokens: int) -> str:
        """Seconds of the build; "" where it was cut off once."""
        begin, kept = time.time(), root.with_name(f"{root.name}.seconds")
        whole = not root.exists()
        options = BuildOptions(
            data=list(data),
            out=root,
            attention=attention,
            ffn=ffn,
            layers=layers,
            tokens=num_tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            lr=lr,
        )
        build_library(parent, options)
        seconds = time.time() - begin
        if whole:
            kept.write_text(f"{seconds:.1f}")
        score_library(root, list(data), ScoreOptions(sequences=score_sequences, seq_len=seq_len), parent=parent)
        print(f"{root}: built in {seconds:.1f} s, scored in {time.time() - begin - seconds:.1f} s", flush=True)
        return kept.read_text() if kept.is_file() else ""

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with contextlib.ExitStack() as stack:
        begun = initial or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "initial"
        built(begun, 0)
        seconds = built(library, int(tokens))
        rows = compared(begun, library)
    out.parent.mkdir(parents=True, exist_ok=True)
    head = (
        "kind,variant,nmse_init,nmse_trained,kl_init,kl_trained,kl_lowered_by,layers_lowered,num_layers,"
        "tokens,lr,build_seconds,device,torch,date"
    )
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(head.split(","))
        for fields in rows:
            common = (int(tokens), lr, seconds, device, torch.__version__, time.strftime("%Y-%m-%d"))
            writer.writerow((*fields, *common))
            print(*fields, flush=True)


if __name__ == "__main__":
    main()
