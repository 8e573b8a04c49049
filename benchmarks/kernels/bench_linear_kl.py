"""LM head and KL(parent‖child) without the logits: our two ways beside torch's, forward and forward with backward.

T 8192 tokens, H 4096, V 128256, bf16. FLOP: two products forward. Extra memory: the peak of one call above what stood before.
Calls run eagerly between events (they take tens of milliseconds); p50.

    python benchmarks/kernels/bench_linear_kl.py --out benchmarks/results/linear_kl.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import median

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import environment, matmul_rate
from kernel_report import BF16
from puzzle.kernels.linear_kl import Chunks, Fused, linear_kl


def plain(parent, child, weight):
    p, q = F.linear(parent, weight).float(), F.linear(child, weight).float()
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)


def timed(call, repeats: int) -> tuple[float, float]:
    """Median seconds and extra bytes."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    samples = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3)
    return median(samples), torch.cuda.max_memory_allocated() - before


@click.command()
@click.option("--tokens", default=8192)
@click.option("--hidden", default=4096)
@click.option("--vocab", default=128256)
@click.option("--repeats", default=7)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(tokens: int, hidden: int, vocab: int, repeats: int, out: Path) -> None:
    facts, rate = environment(), matmul_rate()
    print(f"bf16 products {rate / 1e12:.0f} TFLOP/s")
    weight = torch.empty(vocab, hidden, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)
    parent, noise = torch.randn(2, tokens, hidden, device="cuda").bfloat16()
    child = (parent + 0.1 * noise).requires_grad_()
    ways = {
        "puzzle chunks": (lambda: linear_kl(parent, child, weight, config=Chunks()).kl, True),
        "puzzle fused": (lambda: linear_kl(parent, child, weight, config=Fused()).kl, False),
        "torch": (lambda: plain(parent, child, weight), True),
    }
    flop = 4 * tokens * hidden * vocab
    with open(out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        header = ["tokens", "hidden", "vocab", "way", "pass", "seconds", "extra_gigabytes", "share_of_measured"]
        writer.writerow([*header, "share_of_datasheet", *facts])
        for way, (call, backward) in ways.items():
            passes = {"forward": lambda c=call: c().detach()}
            if backward:
                passes["forward and backward"] = lambda c=call: torch.autograd.grad(c().sum(), child)
            for name, run in passes.items():
                try:
                    with torch.set_grad_enabled(name != "forward"):
                        seconds, extra = timed(run, repeats)
                except torch.cuda.OutOfMemoryError:
                    print(way, name, "does not fit")
                    torch.cuda.empty_cache()
                    continue
                amount = flop * (1 if name == "forward" else 2.5)  # the logits again, and one product more
                shares = [f"{amount / seconds / rate:.3f}", f"{amount / seconds / BF16:.3f}"]
                row = [tokens, hidden, vocab, way, name, f"{seconds:.4g}", f"{extra / 1e9:.3f}", *shares]
                writer.writerow([*row, *facts.values()])
                print(*row, flush=True)


if __name__ == "__main__":
    main()
