"""Decode attention on this GPU: our kernel over a paged cache beside torch's SDPA over a contiguous one.

32 query heads of 128, bf16 queries. The figure is bytes of K and V that must be read over the time, as a share of the read
bandwidth measured in the same run. Caches rotate through several times the L2; calls are replayed as one CUDA graph; p50 of
replays. --sweep tries numbers of stretches, warps and stages; --warm compiles one share (I/N) of them and stops.

    python benchmarks/kernels/bench_decode_attention.py --out benchmarks/results/decode_attention.csv [--sweep] [--warm I/N]
"""

from __future__ import annotations

import csv
import sys
from itertools import product
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import environment, read_bandwidth
from kernel_report import BANDWIDTH
from puzzle.kernels import decode_attention as module
from puzzle.kernels.decode_attention import decode_attention
from puzzle.kernels.timer import num_copies, time_calls

HEADS, DIM, PAGE = 32, 128, 64
POINTS = [(64, 4096, kv, None) for kv in (8, 4, 2, 1)] + [
    (64, 4096, 8, 1024),
    (1, 4096, 8, None),
    (16, 4096, 8, None),
    (256, 1024, 8, None),
    (1, 32768, 8, None),
    (64, 512, 8, None),
]
DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
SWEEP = ((2, 4), (2, 3, 4))  # warps, stages


def paged(batch: int, context: int, kv: int, dtype: torch.dtype, copies: int) -> list:
    pages = -(-context // PAGE)
    found = []
    for _ in range(copies):
        cache = torch.empty(batch * pages, 2, kv, PAGE, DIM, device="cuda", dtype=torch.bfloat16).normal_().to(dtype)
        table = torch.randperm(batch * pages, device="cuda").view(batch, pages).int()
        q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
        found.append((q, cache, table, lengths))
    return found


def run(
    made: list, context: int, window: int | None, seconds: float, splits: int | None = None, warps: int | None = None
) -> float:
    calls = [
        lambda q=q, c=c, t=t, n=n: decode_attention(
            q, c, t, n, max_context=context, window=window, splits=splits, num_warps=warps
        )
        for q, c, t, n in made
    ]
    return time_calls(calls, seconds=seconds, min_samples=8).p50


def sdpa(batch: int, context: int, kv: int, copies: int) -> float:
    """One query per sequence; the query heads of a group are rows, which is how torch reads K and V once."""
    calls = []
    for _ in range(copies):
        k, v = (torch.randn(batch, kv, context, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(batch, kv, HEADS // kv, DIM, device="cuda", dtype=torch.bfloat16)
        calls.append(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))
    return time_calls(calls, seconds=0.03, min_samples=8).p50


def warm(share: str) -> None:
    index, count = map(int, share.split("/"))
    kinds = dict.fromkeys((kv, window) for _, _, kv, window in POINTS)
    for (kv, window), dtype, warps, stages in list(product(kinds, DTYPES, *SWEEP))[index::count]:
        module.NUM_STAGES = dict.fromkeys((1, 2), stages)
        for splits in (1, 4):
            for q, c, t, n in paged(2, 1024, kv, dtype, 1):
                decode_attention(q, c, t, n, max_context=1024, window=window, splits=splits, num_warps=warps)


@click.command()
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--sweep", is_flag=True)
@click.option("--warm", "share", default=None)
def main(out: Path, sweep: bool, share: str | None) -> None:
    if share:
        warm(share)
        return
    default = module.NUM_STAGES
    facts, bandwidth = environment(), read_bandwidth("cuda")
    print(f"read bandwidth {bandwidth / 1e12:.3f} TB/s")
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        header = ["batch", "context", "kv_heads", "window", "cache", "way", "config", "seconds", "share_of_measured",
                  "share_of_datasheet", *facts]  # fmt: skip
        writer.writerow(header)
        for (batch, context, kv, window), dtype in product(POINTS, DTYPES):
            reach = min(context, window or context)
            size = 2 * batch * reach * kv * DIM * dtype.itemsize
            copies = min(num_copies(size), 64)
            made = paged(batch, context, kv, dtype, copies)
            results = {}
            if sweep:
                tries = {}
                for warps, stages, splits in product(*SWEEP, (None, 1, 2, 4, 8)):
                    module.NUM_STAGES = dict.fromkeys((1, 2), stages)
                    if splits and splits * 128 > reach:
                        continue
                    try:
                        tries[warps, stages, splits] = run(made, context, window, 0.004, splits, warps)
                    except Exception as error:  # a configuration that does not compile or fit is out of the race
                        print("  skipped", warps, stages, splits, type(error).__name__)
                for best in sorted(tries, key=tries.__getitem__)[:4]:
                    print("  ", best, f"{1e6 * tries[best]:.1f} us, share {size / tries[best] / bandwidth:.3f}")
                module.NUM_STAGES = default
            results["puzzle"] = run(made, context, window, 0.03)
            if dtype == torch.bfloat16 and window is None:
                results["torch sdpa"] = sdpa(batch, context, kv, copies)
            for way, seconds in results.items():
                name = str(dtype).removeprefix("torch.")
                row = [batch, context, kv, window or "", name, way, "", f"{seconds:.4g}",
                       f"{size / seconds / bandwidth:.3f}", f"{size / seconds / BANDWIDTH:.3f}"]  # fmt: skip
                writer.writerow([*row, *facts.values()])
                print(*row, flush=True)
            del made


if __name__ == "__main__":
    main()
