"""RoPE on Q and K with the write into the paged cache: our kernel beside the same in torch operations.

Bytes: q, k, v read, q, k, v written (k and v as the cache holds them), 32 query heads of 128. Operands rotate through several
times the L2; calls are replayed as one CUDA graph; p50 of replays.

    python benchmarks/kernels/bench_rope_kv.py --out benchmarks/results/rope_kv.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import copy_bandwidth
from kernel_report import BANDWIDTH, Report
from puzzle.kernels.rope_kv import rope_kv
from puzzle.kernels.timer import num_copies, time_calls

HEADS, DIM, PAGE = 32, 128, 64
POINTS = [
    (tokens, kv, dtype)
    for tokens in (8192, 2048, 64)
    for kv in (8, 4, 1)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn)
]


def plain(q, k, v, cos, sin, at, cache, table, slots):
    """The same in torch operations; fp8 goes in as bytes, since indexed writes know no fp8."""
    block, row = (at // PAGE).long(), (at % PAGE).long()

    def rotate(x):
        first, second = x.float().chunk(2, dim=-1)
        c, s = cos[:, None, : DIM // 2], sin[:, None, : DIM // 2]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    for index, value in enumerate((rotate(k), v)):
        value = value.to(cache.dtype)
        if cache.dtype == torch.float8_e4m3fn:
            cache.view(torch.uint8)[block, index, :, row] = value.view(torch.uint8)
        else:
            cache[block, index, :, row] = value
    return rotate(q).to(q.dtype)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    report = Report(out, ["tokens", "kv_heads", "cache"], copy_bandwidth(), BANDWIDTH)
    for tokens, kv, dtype in POINTS:
        size = 4 * tokens * HEADS * DIM + tokens * kv * DIM * (4 + 2 * dtype.itemsize)
        made = []
        for _ in range(min(num_copies(size), 400)):
            qkv = torch.randn(tokens, HEADS + 2 * kv, DIM, device="cuda").bfloat16()
            cache = torch.zeros(-(-tokens // PAGE), 2, kv, PAGE, DIM, dtype=dtype, device="cuda")
            made.append((*qkv.split((HEADS, kv, kv), dim=1), cache))
        at = torch.arange(tokens, device="cuda", dtype=torch.int32)
        cos, sin = torch.randn(2, tokens, DIM, device="cuda")

        def call(m, op, at=at, cos=cos, sin=sin):
            q, k, v, cache = m
            return op(q, k, v, cos, sin, at, cache, None, slots=at)

        for way, op in (("puzzle", rope_kv), ("torch", plain)):
            found = time_calls([lambda m=m, op=op: call(m, op) for m in made], seconds=0.02, min_samples=5)
            report.add([tokens, kv, str(dtype)[6:]], way, found.p50, size)


if __name__ == "__main__":
    main()
