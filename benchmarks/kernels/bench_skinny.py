"""Products with few rows on this GPU (`kernels/skinny.py`) beside cuBLAS: SwiGLU's gate-up product and plain linear maps.

The figure is bytes of the weight over the time, as a share of the read bandwidth measured in the same run and of the
datasheet's 3.35 TB/s. Operands rotate through several times the L2; calls are replayed as one CUDA graph; p50 of replays.
--sweep times every tile of each shape and prints the best; --warm compiles one share (I/N) of the tiles and stops.

    python benchmarks/kernels/bench_skinny.py --out benchmarks/results/skinny.csv [--sweep] [--warm I/N]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import environment, read_bandwidth
from kernel_report import BANDWIDTH
from puzzle.kernels.skinny import Config, skinny_linear
from puzzle.kernels.swiglu import choose_linear, fp8_product, rows_to_fp8, silu_mul
from puzzle.kernels.timer import num_copies, time_calls

HIDDEN = 4096
GATED = [(w, HIDDEN) for w in (14336, 8192, 3584, 2048, 1024, 512)]  # width, columns
PLAIN = [(6144, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 14336), (HIDDEN, 3584)]  # rows of w, columns
TILES = [(64, 128, 4, 4), (64, 256, 4, 3), (32, 256, 4, 4), (32, 128, 4, 6), (128, 128, 8, 4)]


def points() -> list[tuple[str, int, int, int, torch.dtype]]:
    """(gated or plain, rows of x, rows of w, columns, dtype)"""
    found = []
    for rows in (1, 16, 64):
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            found += [("gated", rows, 2 * width, k, dtype) for width, k in GATED]
            found += [("plain", rows, n, k, dtype) for n, k in PLAIN]
    return found


def tiles(num: int, columns: int) -> list[Config]:
    found = []
    for tile in TILES:
        for split in (1, 2, 4, 8):
            programs = -(-num // tile[0]) * split
            if 64 <= programs <= 1100 and columns // tile[1] >= 2 * split:
                found += [Config(*tile, split_k=split, prefetch=prefetch) for prefetch in (0, 512)]
    return found


def operands(rows: int, num: int, columns: int, dtype: torch.dtype, count: int | None = None) -> list:
    made = []
    for _ in range(count or min(num_copies(num * columns * dtype.itemsize), 200)):
        w = torch.empty(num, columns, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)
        scale = torch.full((num,), 0.01, device="cuda") if dtype == torch.float8_e4m3fn else None
        x = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        made.append((x, w if scale is None else (w / 0.01).to(dtype), scale))
    return made


def calls(made: list, gated: bool, config: Config) -> list:
    return [lambda x=x, w=w, s=s: skinny_linear(x, w, config, scale=s, gated=gated) for x, w, s in made]


def cublas(made: list, gated: bool) -> list:
    """bf16 products, or fp8 ones of x made fp8 by row, which want rows in sixteens."""
    if made[0][2] is not None:

        def product(x, w, scale):
            out = fp8_product(*rows_to_fp8(x), w, scale, x.dtype)
            return silu_mul(out) if gated else out

        return [lambda x=x, w=w, s=s: product(x, w, s) for x, w, s in made]
    if gated:
        return [lambda x=x, w=w: silu_mul(F.linear(x, w)) for x, w, _ in made]
    return [lambda x=x, w=w: F.linear(x, w) for x, w, _ in made]


def warm(share: str) -> None:
    index, count = map(int, share.split("/"))
    seen = {}
    for kind, rows, num, columns, dtype in points():
        for config in tiles(num, columns):
            seen[kind, max(16, rows), dtype, config, num % 16] = (kind, rows, num, columns, dtype, config)
    for kind, rows, num, columns, dtype, config in sorted(seen.values(), key=str)[index::count]:
        try:
            calls(operands(rows, num, columns, dtype, 1), kind == "gated", config)[0]()
        except Exception as error:
            print("skipped", kind, rows, config, type(error).__name__)


@click.command()
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--sweep", is_flag=True)
@click.option("--warm", "share", default=None)
def main(out: Path, sweep: bool, share: str | None) -> None:
    if share:
        warm(share)
        return
    facts, bandwidth = environment(), read_bandwidth("cuda")
    print(f"read bandwidth {bandwidth / 1e12:.3f} TB/s")
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        header = ["kind", "rows", "weight_rows", "columns", "dtype", "megabytes", "way", "config", "seconds"]
        writer.writerow([*header, "share_of_measured", "share_of_datasheet", *facts])
        for kind, rows, num, columns, dtype in points():
            if sweep and rows == 1:
                continue
            made, gated = operands(rows, num, columns, dtype), kind == "gated"
            size = num * columns * dtype.itemsize
            config = choose_linear(rows, num, columns, dtype)
            tries = {}
            for tile in tiles(num, columns) if sweep else []:
                try:
                    tries[tile] = time_calls(calls(made, gated, tile), seconds=0.006, min_samples=4).p50
                except Exception as error:  # a tile that does not compile or fit is out of the race
                    print("  skipped", tile, type(error).__name__)
            for best in sorted(tries, key=tries.__getitem__)[:3]:
                print("   ", tuple(best), f"{1e6 * tries[best]:.2f} us, {size / tries[best] / bandwidth:.3f}")
            config = min(tries, key=tries.__getitem__) if tries else config
            ways = {} if config is None else {"skinny": calls(made, gated, config)}
            if dtype == torch.bfloat16 or rows % 16 == 0:
                ways["cublas"] = cublas(made, gated)
            for way, found in ways.items():
                seconds = time_calls(found, seconds=0.02, min_samples=8).p50
                row = [kind, rows, num, columns, str(dtype)[6:], round(size / 1e6, 1), way,
                       "/".join(map(str, config)) if way == "skinny" else "", f"{seconds:.4g}",
                       f"{size / seconds / bandwidth:.3f}", f"{size / seconds / BANDWIDTH:.3f}"]  # fmt: skip
                writer.writerow([*row, *facts.values()])
                print(*row, flush=True)
            del made


if __name__ == "__main__":
    main()
