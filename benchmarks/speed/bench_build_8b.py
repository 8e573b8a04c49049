"""Block-local distillation at Llama-3.1-8B shapes on one GPU: predicted against measured memory, time and FLOPs.

Protocol: a parent of random weights with Llama-3.1-8B's layer shapes (hidden 4096, 32 heads, 8 KV heads, FFN 14336,
vocabulary 128256) and --num-layers layers is written, as a child that changes nothing; the default search space of --layers is trained on --tokens
tokens of text under --memory-limit. Speed is that of the training steps, first ones and graph capture included.
MFU is tokens per second times the FLOPs that a step must do for a token (`puzzle.library.plan.training_flops`) over --peak-flops (dense bf16
by the datasheet). Without a gradient of what enters a sub-block, and with nothing computed twice, that is 2.8e9 a token and layer.

    python benchmarks/speed/bench_build_8b.py --data /usr/lib/python3.12 --tokenizer examples/parent --num-layers 4 \\
        --layers 0-3 --tokens 1.2e6 --batch-size 8 --out benchmarks/results/build_8b.csv

--steps also times single steps of one layer, with what `benchmarks/lib/build_changes.py` lists turned on one by one, then with --more-batches
sequences at once; --profile says where the first and the last of these spend their time; --without turns some of it off everywhere;
--tokens 0 leaves the build out:

    python benchmarks/speed/bench_build_8b.py --data /usr/lib/python3.12 --tokenizer examples/parent --num-layers 1 --layers 0 --tokens 0 \\
        --steps benchmarks/results/build_8b_steps.csv --profile benchmarks/results/build_8b_steps_profile.csv
"""

from __future__ import annotations

import csv
import gc
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from build_changes import OFF, one_by_one, without
from puzzle.base.units import parse_bytes
from puzzle.export.hf import write_hf
from puzzle.library.build import Builder, BuildOptions
from puzzle.library.estimate import layer_step, predict_seconds, step_seconds
from puzzle.library.plan import training_flops
from puzzle.parents.known import known_structure
from puzzle.parents.opened import HfModel, open_model
from random_child import random_child
from step_profile import longest_kernels, seconds_by_class, traced

NUM_LAYERS = 32  # of the model whose tokens per second are told for single steps
NUM_STEPS = 8
FACTS = ("device", "torch", "date")
STEP_COLUMNS = (
    "turned_on", "still_off", "tokens_a_step", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes", *FACTS
)  # fmt: skip
KERNEL_COLUMNS = ("turned_on", "class", "seconds", "share", *FACTS)


def write_parent(directory: Path, tokenizer: Path, num_layers: int) -> None:
    """A checkpoint of random bf16 weights."""
    whole = known_structure("llama-3.1-8b")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02

    structure = whole.with_layers(whole.layers[:num_layers])
    write_hf(random_child(structure, whole.usual, noise, torch.bfloat16, tokenizer), directory, "")


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Share of `peak_flops` that goes into what a step must do. flops_per_token: of all layers that are trained."""
    return tokens_per_second * flops_per_token / peak_flops


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0


def write_rows(out: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerows([columns, *rows])


def where_and_when() -> tuple[str, str, str]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return name, torch.__version__, time.strftime("%Y-%m-%d")


def build(parent: HfModel, options: BuildOptions, peak_flops: float) -> list[tuple[str, float, float]]:
    """(quantity, predicted, measured) of a whole build."""
    builder = Builder(parent, options)
    plan = builder.plan()
    predicted_seconds = predict_seconds(builder, plan)
    reset_peak()
    print(f"plan: groups {plan.groups}, {plan.peak_memory_bytes / 1e9:.1f} GB, {predicted_seconds:.1f} s", flush=True)
    builder.run(builder.load_data())
    measured, peak = builder.train_seconds, peak_memory()
    disk = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    rates = [plan.num_tokens / predicted_seconds, plan.num_tokens / measured]
    shares = [round(mfu(rate, plan.flops / plan.num_tokens, peak_flops), 4) for rate in rates]
    return [
        ("peak_memory_bytes", plan.peak_memory_bytes, peak),
        ("training_seconds", round(predicted_seconds, 1), round(measured, 1)),
        ("tokens_per_second", round(rates[0]), round(rates[1])),
        ("mfu", shares[0], shares[1]),
        ("library_bytes", plan.num_trained_parameters * builder.stored_dtype.itemsize, disk),
    ]


def steps(
    parent: HfModel,
    options: BuildOptions,
    more: Sequence[int],
    never: Sequence[str],
    peak_flops: float,
    out: Path,
    profile_out: Path | None,
) -> None:
    """Times of single steps of one layer, nothing turned on first, `never` stays off. One that fails is told and left out."""
    found = Builder(parent, options)
    layer, space = next(iter(found.structure.layers)), next(iter(found.spaces.values()))
    flops = training_flops(layer, space, options.seq_len, options.nested)
    print(f"a step must do {flops / 1e9:.3f}e9 FLOP a token and layer; {NUM_LAYERS} layers are told", flush=True)
    runs = [(name, off, options.batch_size) for name, off in one_by_one(never)]
    last = runs[-1][0]
    runs += [(f"{size} sequences", list(never), size) for size in more]
    rows: list[Sequence[object]] = []
    kernels: list[Sequence[object]] = []
    for name, off, batch in runs:
        reset_peak()
        try:
            with without(off):
                builder = Builder(parent, replace(options, batch_size=batch))
                step, x = layer_step(builder)
                seconds = step_seconds(step, x, NUM_STEPS)
                peak, tokens = peak_memory(), batch * options.seq_len
                if profile_out is not None and name in ("nothing", last, runs[-1][0]):
                    kernels += profile_rows(step, x, name, tokens, seconds)
                del step, builder, x
        except Exception as error:  # the others are worth having
            print(f"{name}: {error!r:.400}", flush=True)
            continue
        rate = tokens / seconds / NUM_LAYERS
        share = mfu(rate, NUM_LAYERS * flops, peak_flops)
        rows.append((name, " ".join(off), tokens, seconds, round(rate), round(share, 4), peak, *where_and_when()))
        print(
            f"{name:>14}: {seconds * 1e3:8.2f} ms for {tokens} tokens, {rate:8,.0f} tokens/s, MFU {share:.3f}, "
            f"{peak / 1e9:.1f} GB, 20 M tokens in {20e6 / rate / 60:.0f} minutes", flush=True,
        )  # fmt: skip
        write_rows(out, STEP_COLUMNS, rows)  # a later one may fail or take too long
        if profile_out is not None:
            write_rows(profile_out, KERNEL_COLUMNS, kernels)


def profile_rows(
    step: object, x: torch.Tensor, name: str, tokens: int, seconds: float
) -> list[Sequence[object]]:  # fmt: skip
    """(what is turned on, class, seconds, share of a replayed step), printed too."""
    events = traced(lambda: step.function(x))  # type: ignore[attr-defined]
    classes = seconds_by_class(events, tokens)
    count = classes.pop("kernels")
    classes["idle"] = max(0.0, seconds - sum(classes.values()))
    print(f"where the step goes with {name} turned on, {count:.0f} kernels:", flush=True)
    for cls, time_of in classes.items():
        print(f"  {cls:>14} {time_of * 1e3:8.3f} ms {100 * time_of / seconds:5.1f} %", flush=True)
    for kernel, calls, time_of in longest_kernels(events):
        print(f"    {time_of * 1e3:8.3f} ms {calls:4d} x {kernel}", flush=True)
    return [(name, cls, value, round(value / seconds, 4), *where_and_when()) for cls, value in classes.items()]


@click.command()
@click.option("--data", required=True, multiple=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), help="CSV of the build.")
@click.option("--num-layers", type=int, default=11, show_default=True)
@click.option("--layers", default="0-10", show_default=True)
@click.option("--tokens", type=float, default=2.5e5, show_default=True)
@click.option("--seq-len", type=int, default=2048, show_default=True)
@click.option("--batch-size", type=int, default=4, show_default=True)
@click.option("--memory-limit", default="80GB", show_default=True)
@click.option("--peak-flops", type=float, default=989e12, show_default=True)
@click.option("--group-size", type=int, help="Layers at a time; streams between groups wait in host memory.")
@click.option("--nested", is_flag=True, help="MFU then counts the widest of a nest, which holds the others.")
@click.option("--without", "left_out", default="", help=f"Comma-separated, of {', '.join(OFF)}.")
@click.option("--steps", "steps_out", type=click.Path(path_type=Path), help="CSV of single steps.")
@click.option("--more-batches", default="8,16", show_default=True, help="Sequences at once, for --steps.")
@click.option("--profile", "profile_out", type=click.Path(path_type=Path), help="CSV of time by class of kernel.")
@click.option("--parent", type=click.Path(path_type=Path), help="A checkpoint in place of the random one.")
def main(
    data: tuple[str, ...],
    tokenizer: Path,
    out: Path | None,
    num_layers: int,
    layers: str,
    tokens: float,
    seq_len: int,
    batch_size: int,
    memory_limit: str,
    peak_flops: float,
    group_size: int | None,
    nested: bool,
    left_out: str,
    steps_out: Path | None,
    more_batches: str,
    profile_out: Path | None,
    parent: Path | None,
) -> None:
    never = [name for name in left_out.split(",") if name]
    with tempfile.TemporaryDirectory() as work, without(never):
        begin = time.time()
        if parent is None:
            parent = Path(work) / "parent"
            write_parent(parent, tokenizer, num_layers)
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
            nested=nested,
            group_size=group_size,
        )
        model = open_model(parent)
        if steps_out is not None:
            more = [int(size) for size in more_batches.split(",") if size]
            steps(model, options, more, never, peak_flops, steps_out, profile_out)
        if not tokens:
            return
        reset_peak()
        plan = Builder(model, options).plan()
        facts = (layers, len(plan.groups), plan.num_tokens, *where_and_when())
        rows = [(*row, *facts) for row in build(model, options, peak_flops)]
    columns = ("quantity", "predicted", "measured", "layers", "groups", "tokens", *FACTS)
    if out is not None:
        write_rows(out, columns, rows)
    for row in rows:
        print(*row[:3], flush=True)


if __name__ == "__main__":
    main()
