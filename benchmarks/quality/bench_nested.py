"""Narrow FFNs trained one by one or nested, as the first channels of one: KL at equal tokens and at equal seconds of training.

Protocol: the FFN widths of every layer of --parent are trained on each of --tokens, alone and nested, from the same data and the same
initial channels, and scored on the same held-out sequences. Reported per way, tokens and width: seconds of the training steps, the
median over layers of the normalised MSE of the sub-block's output and of KL(parent‖child) where it alone replaces its parent's. The
two ways at equal tokens stand in rows of equal tokens; at equal seconds, between the rows of the faster one.

    python benchmarks/quality/bench_nested.py --data /usr/lib/python3.12 --out benchmarks/results/nested.csv
    python benchmarks/quality/bench_nested.py --parent SmolLM2-135M-Instruct --data english.jsonl --lr 1e-3 --tokens 2e6,6e6 \\
        --out benchmarks/results/nested_smollm2.csv
"""

from __future__ import annotations

import csv
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from puzzle.library.build import Builder, BuildOptions
from puzzle.library.manifest import Library, score_name
from puzzle.library.score import ScoreOptions, score_library
from puzzle.library.store import BlockStore
from puzzle.parents.opened import open_model

COLUMNS = ("way", "num_tokens", "seconds", "flops", "width", "nmse", "kl", "parent", "device", "date")


@click.command()
@click.option("--parent", default="examples/parent", show_default=True)
@click.option("--data", required=True, multiple=True)
@click.option("--text-field", default="text", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--ffn", default="0.75,0.5,0.25,0.1", show_default=True)
@click.option("--layers", help="Only these.")
@click.option("--tokens", default="2e6,8e6,24e6", show_default=True, help="Comma-separated.")
@click.option("--seq-len", type=int, default=1024, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True)
@click.option("--lr", type=float, default=2e-3, show_default=True)
@click.option("--score-sequences", type=int, default=64, show_default=True)
def main(
    parent: str, data: tuple[str, ...], text_field: str, out: Path, ffn: str, layers: str | None, tokens: str, seq_len: int,
    batch_size: int, lr: float, score_sequences: int,
) -> None:  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    rows = []
    for num_tokens in (int(float(t)) for t in tokens.split(",")):
        for way in ("alone", "nested"):
            with tempfile.TemporaryDirectory() as work:
                options = BuildOptions(
                    data=list(data), out=Path(work), attention="parent", ffn=ffn, layers=layers, tokens=num_tokens, seq_len=seq_len,
                    batch_size=batch_size, lr=lr, text_field=text_field, nested=way == "nested",
                )  # fmt: skip
                builder = Builder(open_model(parent), options)
                builder.run(builder.load_data())
                scoring = ScoreOptions(sequences=score_sequences, seq_len=seq_len, text_field=text_field)
                score_library(Path(work), list(data), scoring, parent=parent)
                library, store = Library.open(Path(work)), BlockStore(Path(work))
                for name in ffn.split(","):
                    scores = [library.scores(n)[score_name({"ffn": name})]["kl"] for n in library.layers]
                    losses = [store.record(n, "ffn", name)["validation_loss_after"] for n in library.layers]
                    row = (way, num_tokens, f"{builder.train_seconds:.1f}", f"{builder.plan().flops:.3g}", name)
                    figures = (f"{statistics.median(losses):.5f}", f"{statistics.median(scores):.5f}")
                    rows.append((*row, *figures, Path(parent).name, device, time.strftime("%Y-%m-%d")))
                    print(*rows[-1][:7], flush=True)
                with open(out, "w", newline="", encoding="utf-8") as handle:
                    csv.writer(handle).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
