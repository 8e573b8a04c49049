"""Residual add and RMSNorm on this GPU: our kernel beside torch's add and rms_norm.

Bytes: x and residual read, normed and new residual written, bf16. Operands rotate through several times the L2; calls are
replayed as one CUDA graph; p50 of replays.

    python benchmarks/kernels/bench_rmsnorm.py --out benchmarks/results/rmsnorm.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import copy_bandwidth
from kernel_report import BANDWIDTH, Report
from puzzle.kernels.rmsnorm import rms_norm
from puzzle.kernels.timer import num_copies, time_calls

POINTS = [(8192, 4096), (8192, 8192), (2048, 4096), (8192, 2048), (16384, 16384), (64, 4096)]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    report = Report(out, ["rows", "hidden"], copy_bandwidth(), BANDWIDTH)
    for rows, hidden in POINTS:
        size = 8 * rows * hidden
        made = [torch.randn(2, rows, hidden, device="cuda").bfloat16() for _ in range(min(num_copies(size), 400))]
        weight = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)

        def plain(m, w=weight, h=hidden):
            stream = m[0] + m[1]
            return F.rms_norm(stream, (h,), w, 1e-5), stream

        ways = {"puzzle": lambda m, w=weight: rms_norm(m[0], m[1], w, 1e-5), "torch": plain}
        ways["torch.compile"] = torch.compile(plain)
        for way, call in ways.items():
            found = time_calls([lambda m=m, c=call: c(m) for m in made], seconds=0.03)
            report.add([rows, hidden], way, found.p50, size)


if __name__ == "__main__":
    main()
