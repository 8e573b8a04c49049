"""Heal a child of the reference parent from a teacher that is there, and from its stored top words, at equal tokens.

Protocol: the child has no attention in every third layer and no FFN in two, untrained; the text is that of
lib/reference_corpus.py. All runs see the same rows in the same order and differ in how the teacher teaches: KL over all words from
a teacher in memory, forward, half and half, or reverse; or KL over the top K words and the rest, from `--teacher-logits`. KL(parent‖child)
over all words and the losses are measured after it on the same held-out sequences by `puzzle.runtime.divergence`.

    python benchmarks/quality/bench_stored_logits.py --out benchmarks/results/stored_logits.csv
    python benchmarks/quality/bench_stored_logits.py --device cuda --tokens 4000000 --batch-size 32 --out stored_logits.csv   # one GPU
    python benchmarks/quality/bench_stored_logits.py --tokens 2048 --max-files 40 --out /tmp/stored_logits.csv      # rehearsal
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.machine import cpu_name
from puzzle.blocklib.none import NO_OP
from puzzle.data.packing import load_tokens
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.heal.run import heal
from puzzle.heal.settings import HealOptions
from puzzle.heal.stored_teacher import bytes_per_token
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model
from reference_corpus import write_corpus
from write_rows import read_rows, write_rows

PARENT = Path(__file__).resolve().parents[2] / "examples" / "parent"
WAYS: dict[str, dict[str, Any]] = {
    "teacher there": {},
    **{f"top {k}": {"top_k": k} for k in (8, 32, 128)},
    "half reverse": {"reverse_kl": 0.5},
    "reverse": {"reverse_kl": 1.0},
}


@click.command()
@click.option("--tokens", default=8192)
@click.option("--batch-size", default=4)
@click.option("--max-files", type=int)
@click.option("--lr", default=5e-4)
@click.option("--device", default="cpu")
@click.option("--append", is_flag=True, help="What --out has stays, and is not measured again.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(tokens: int, batch_size: int, max_files: int | None, lr: float, device: str, append: bool, out: Path) -> None:
    """A row per way of teaching."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_corpus(root / "corpus.jsonl", max_files)
        child = child_of_checkpoint(PARENT)
        layers = list(child.layers)
        for index in range(2, len(layers), 3):
            layers[index] = layers[index].put("attention", NO_OP)
        for index in (4, 9):
            layers[index] = layers[index].put("ffn", NO_OP)
        write_hf(replace(child, layers=tuple(layers)), root / "child", "card")
        held_out = load_tokens([str(root / "corpus.jsonl")], PARENT, seq_len=256, num_train=1, num_validation=32)
        parent, rows = load_model(PARENT, device=device), read_rows(out, append)

        def measure(path: Path) -> dict[str, float]:
            return compare(parent, load_model(path, device=device), held_out.validation)

        before = measure(root / "child")
        for way, options in WAYS.items():
            if way in [row["way"] for row in rows]:
                continue
            stored: dict[str, Any] = {"teacher_logits": root / way} if "top_k" in options else {}
            begin = time.monotonic()
            record = heal(
                HealOptions(
                    child=str(root / "child"), teacher=str(PARENT), data=[str(root / "corpus.jsonl")], out=root / "out",
                    tokens=tokens, seq_len=256, batch_size=batch_size, lr=lr, cosine_weight=0.0, eval_every=0, save_every=0,
                    validation_sequences=8, device=device, force=True, **options, **stored,
                )
            )  # fmt: skip
            after, k = measure(root / "out"), options.get("top_k")
            rows.append(
                {
                    "way": way,
                    "bytes_per_token": bytes_per_token(k, parent.head_weight.shape[0]) if k else "",
                    "tokens": record["num_tokens"],
                    "kl_before": f"{before['kl']:.5f}",
                    "kl": f"{after['kl']:.5f}",
                    "loss": f"{after['lm_loss']:.5f}",
                    "parent_loss": f"{after['parent_loss']:.5f}",
                    "seconds": f"{time.monotonic() - begin:.1f}",
                    "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "date": time.strftime("%Y-%m-%d"),
                }
            )
            click.echo(rows[-1])
            write_rows(out, rows)


if __name__ == "__main__":
    main()
