"""Normalised MSE of block outputs, forward and backward: our kernel beside torch, eager and compiled.

Bytes: forward reads child and parent; backward reads both again and writes the gradient, bf16. Operands rotate through
several times the L2; calls are replayed as one CUDA graph; p50 of replays.

    python benchmarks/kernels/bench_block_loss.py --out benchmarks/results/block_loss.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import read_bandwidth
from kernel_report import BANDWIDTH, Report
from puzzle.kernels.block_loss import block_loss_reference, gradient, loss_and_energy
from puzzle.kernels.timer import num_copies, time_calls


def twin(child, parent):
    child = child.detach().requires_grad_()
    block_loss_reference(child, parent).backward()
    return child.grad


def compiled(child, parent):
    difference, energy = child.float() - parent.float(), parent.float().square().sum()
    return difference.square().sum() / energy, (2 * difference / energy).to(child.dtype)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    report = Report(out, ["rows", "hidden"], read_bandwidth(), BANDWIDTH)
    for rows, hidden in ((8192, 4096), (32768, 4096), (8192, 256), (65536, 256)):
        size = 10 * rows * hidden
        made = [torch.randn(2, rows, hidden, device="cuda").bfloat16() for _ in range(min(num_copies(size), 100))]

        def both(child, parent):
            _, energy = loss_and_energy(child, parent)
            return gradient(child, parent, energy)

        for way, call in (("puzzle", both), ("torch", twin), ("torch.compile", torch.compile(compiled))):
            found = time_calls([lambda m=m, c=call: c(m[0], m[1]) for m in made], seconds=0.03, min_samples=5)
            report.add([rows, hidden], way, found.p50, size)


if __name__ == "__main__":
    main()
