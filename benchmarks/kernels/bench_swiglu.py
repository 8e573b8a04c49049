"""The SwiGLU FFN with many rows (prefill) on this GPU: our path beside torch's, bf16 and fp8. Few rows: bench_skinny.py.

FLOP of gate, up and down over the time, as a share of the rate of a square product measured in the same run and of the
datasheet. fp8 includes making x and the activation fp8, by row. Calls are replayed as one CUDA graph; p50 of replays.

    python benchmarks/kernels/bench_swiglu.py --out benchmarks/results/swiglu.csv
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import matmul_rate
from kernel_report import BF16, FP8, Report
from puzzle.kernels.fp8 import to_fp8
from puzzle.kernels.swiglu import fp8_product, pack_swiglu, swiglu
from puzzle.kernels.timer import num_copies, time_calls

HIDDEN = 4096


def plain(x, w):
    up = F.linear(x, w.gate_up)
    width = up.shape[1] // 2
    return F.linear(F.silu(up[:, :width]) * up[:, width:], w.down)


def plain_fp8(x, w):
    """The same through torch: scales by row, products in fp8."""
    value, scale = to_fp8(x)
    up = fp8_product(value, scale, w.gate_up, w.gate_up_scale, x.dtype)
    width = up.shape[1] // 2
    value, scale = to_fp8(F.silu(up[:, :width]) * up[:, width:])
    return fp8_product(value, scale, w.down, w.down_scale, x.dtype)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    report = Report(out, ["rows", "hidden", "width", "dtype"], matmul_rate(), BF16)
    rates = {"bf16": (report.ceiling, BF16), "fp8": (matmul_rate(torch.float8_e4m3fn), FP8)}
    print(f"fp8 products {rates['fp8'][0]:.4g}")
    for width, rows in product((14336, 7168, 3584), (128, 512, 2048, 8192)):
        for dtype, (report.ceiling, report.datasheet) in rates.items():
            made = []
            for _ in range(min(num_copies(6 * HIDDEN * width), 8)):
                gate, up = torch.empty(2, width, HIDDEN, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)
                down = torch.empty(HIDDEN, width, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)
                x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
                made.append((x, pack_swiglu(gate, up, down, fp8=dtype == "fp8")))
            ways = {"puzzle": swiglu}
            torch_way = plain if dtype == "bf16" else plain_fp8
            ways |= {"torch": torch_way, "torch.compile": torch.compile(torch_way)}
            for way, call in ways.items():
                found = time_calls([lambda x=x, w=w, c=call: c(x, w) for x, w in made], seconds=0.1, min_samples=8)
                report.add([rows, HIDDEN, width, dtype], way, found.p50, 6 * rows * HIDDEN * width)


if __name__ == "__main__":
    main()
