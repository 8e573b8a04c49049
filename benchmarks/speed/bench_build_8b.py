"""Block-local distillation at Llama-3.1-8B shapes on one GPU: predicted against measured memory, time and FLOPs.

Protocol: a parent of random weights with Llama-3.1-8B's layer shapes (hidden 4096, 32 heads, 8 KV heads, FFN 14336,
vocabulary 128256) and --num-layers layers is written, as a child that changes nothing; the default search space of --layers is trained on --tokens
tokens of text under --memory-limit. Speed is that of the training steps, first ones and graph capture included.
MFU counts the FLOPs of `puzzle.library.plan.training_flops` against --peak-flops (dense bf16 by the datasheet).

    python benchmarks/speed/bench_build_8b.py --data /usr/lib/python3.12 --tokenizer examples/parent --num-layers 6 \\
        --layers 0-5 --tokens 2.5e5 --memory-limit 40GB --out benchmarks/results/build_8b.csv
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.units import parse_bytes
from puzzle.export.hf import write_hf
from puzzle.library.build import Builder, BuildOptions
from puzzle.library.estimate import predict_seconds
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model
from random_child import random_child


def write_parent(directory: Path, tokenizer: Path, num_layers: int) -> None:
    """A checkpoint of random bf16 weights."""
    whole = known_structure("llama-3.1-8b")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02

    structure = whole.with_layers(whole.layers[:num_layers])
    write_hf(random_child(structure, whole.usual, noise, torch.bfloat16, tokenizer), directory, "")


@click.command()
@click.option("--data", required=True, multiple=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--num-layers", type=int, default=11, show_default=True)
@click.option("--layers", default="0-10", show_default=True)
@click.option("--tokens", type=float, default=2.5e5, show_default=True)
@click.option("--seq-len", type=int, default=2048, show_default=True)
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--memory-limit", default="80GB", show_default=True)
@click.option("--peak-flops", type=float, default=1189e12, show_default=True)
def main(
    data: tuple[str, ...],
    tokenizer: Path,
    out: Path,
    num_layers: int,
    layers: str,
    tokens: float,
    seq_len: int,
    batch_size: int,
    memory_limit: str,
    peak_flops: float,
) -> None:
    with tempfile.TemporaryDirectory() as work:
        begin = time.time()
        write_parent(Path(work) / "parent", tokenizer, num_layers)
        print(f"parent written in {time.time() - begin:.0f} s", flush=True)
        options = BuildOptions(
            data=list(data),
            out=Path(work) / "lib",
            layers=layers,
            tokens=int(tokens),
            seq_len=seq_len,
            batch_size=batch_size,
            memory_limit=parse_bytes(memory_limit),
            calibration_sequences=16,
            validation_sequences=4,
            snapshot_seconds=1e9,
        )
        builder = Builder(open_model(Path(work) / "parent"), options)
        plan = builder.plan()
        predicted_seconds = predict_seconds(builder, plan)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        print(
            f"plan: groups {plan.groups}, {plan.peak_memory_bytes / 1e9:.1f} GB, {predicted_seconds:.1f} s", flush=True
        )
        builder.run(builder.load_data())
        measured = builder.train_seconds
        peak = torch.cuda.max_memory_reserved() if cuda else 0
        disk = sum(f.stat().st_size for f in (Path(work) / "lib").rglob("*") if f.is_file())
        rows = [
            ("peak_memory_bytes", plan.peak_memory_bytes, peak),
            ("training_seconds", round(predicted_seconds, 1), round(measured, 1)),
            ("tokens_per_second", round(plan.num_tokens / predicted_seconds), round(plan.num_tokens / measured)),
            (
                "mfu",
                round(plan.flops / predicted_seconds / peak_flops, 4),
                round(plan.flops / measured / peak_flops, 4),
            ),
            ("library_bytes", plan.num_trained_parameters * builder.stored_dtype.itemsize, disk),
        ]
    name = torch.cuda.get_device_name() if cuda else "cpu"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("quantity", "predicted", "measured", "layers", "groups", "tokens", "device", "torch", "date"))
        for row in rows:
            writer.writerow(
                (*row, layers, len(plan.groups), plan.num_tokens, name, torch.__version__, time.strftime("%Y-%m-%d"))
            )
            print(*row, flush=True)


if __name__ == "__main__":
    main()
