"""How far a decode step of the intact parent is from what its bytes take: weights and cache over the bandwidth of the memory.

Random weights of the named shapes; a step is the median of CUDA-graph replays over --context cached tokens. Bytes: every weight
of the sub-blocks and of the LM head once, one embedding row a sequence, and the cached keys and values. Bandwidth: what a float32
sum over 4 GiB reads in the same run, and the datasheet's.

    python benchmarks/speed/bench_parent_decode.py --gpu h100 --out benchmarks/results/parent_decode.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import environment, read_bandwidth
from kernel_report import BANDWIDTH
from puzzle.base.device import check_gpu
from puzzle.parents.known import known_structure
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import random_model
from step_times import decode_step_seconds

COLUMNS = (
    "shapes", "dtype", "batch", "context", "weight_bytes", "cache_bytes", "seconds", "over_measured_limit", "over_datasheet_limit",
    "measured_bandwidth",
)  # fmt: skip


@click.command()
@click.option("--gpu", required=True)
@click.option("--shapes", "name", default="llama-3.1-8b", show_default=True)
@click.option("--batches", default="1,8,64", show_default=True)
@click.option("--context", default=2048, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(gpu: str, name: str, batches: str, context: int, out: Path) -> None:
    check_gpu(gpu)
    structure, facts, bandwidth = known_structure(name), environment(), read_bandwidth()
    model = random_model(structure, "cuda", torch.bfloat16)
    inner = sum(sub_block.num_parameters for _, _, sub_block in structure)
    head = structure.vocab_size * structure.hidden_size
    with open(out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*COLUMNS, *facts])
        for fp8 in (False, True):
            size = 1 if fp8 else 2
            for batch in map(int, batches.split(",")):
                runtime = FastRuntime(model, batch, context + 1, fp8=fp8)
                seconds = decode_step_seconds(runtime, context, 0.5)
                weights = size * inner + 2 * head
                kept = [sub_block.state().num_bytes(context, "fp8" if fp8 else "bf16") for _, _, sub_block in structure]
                cache = batch * sum(kept)
                limits = [seconds / ((weights + cache) / rate) for rate in (bandwidth, BANDWIDTH)]
                row = [name, "fp8" if fp8 else "bfloat16", batch, context, weights, cache, f"{seconds:.6g}",
                       *(f"{limit:.3f}" for limit in limits), f"{bandwidth:.5g}"]  # fmt: skip
                writer.writerow([*row, *facts.values()])
                print(*row, flush=True)
                del runtime
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
