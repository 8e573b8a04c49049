"""SwiGLU on this GPU: our paths beside torch's (cuBLAS products, activation as two torch ops).

Few rows (decode): weights stream once, so the figure is bytes of gate, up and down over the time, as a share of the read
bandwidth measured in the same run. Many rows (prefill): FLOP over the time, as a share of the measured bf16 rate and of the
datasheet's 989 TFLOP/s. Operands rotate through several times the L2; calls are replayed as one CUDA graph; p50 of replays.
--sweep times every tile of the fused kernel first and uses the best of each shape.

    python benchmarks/bench_swiglu.py --out benchmarks/results/swiglu.csv [--sweep]
"""

from __future__ import annotations

import csv
from itertools import product
from pathlib import Path

import click
import torch
import torch.nn.functional as F

from puzzle.kernels.swiglu import Config, choose, fused_gate_up, pack_swiglu, silu_mul, swiglu
from puzzle.kernels.timer import environment, matmul_rate, num_copies, read_bandwidth, time_calls

HIDDEN = 4096
SKINNY = [(rows, width) for width in (14336, 10752, 7168, 3584, 1536, 768) for rows in (1, 16, 64)]
LARGE = [(rows, width) for width in (14336, 7168, 3584) for rows in (128, 512, 2048, 8192)]
TILES = [*product((16, 32, 64), (64, 128, 256), (4,), (3, 5)), (64, 128, 8, 4), (128, 64, 8, 4)]


def ways(config: Config | None) -> dict:
    found = {
        "torch": lambda x, w: F.linear(
            F.silu((h := F.linear(x, w.gate_up))[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :], w.down
        ),
        "cublas + silu_mul": lambda x, w: F.linear(silu_mul(F.linear(x, w.gate_up)), w.down),
        "puzzle": swiglu,
    }
    if config is not None:
        found["fused"] = lambda x, w: F.linear(fused_gate_up(x, w.gate_up, config), w.down)
    return found


def operands(rows: int, width: int, device: str) -> list:
    count = min(num_copies(3 * HIDDEN * width * 2, device), 40)
    made = []
    for _ in range(count):
        gate, up, down = (torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(std=0.02)
                          for shape in ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width)))  # fmt: skip
        x = torch.randn(rows, HIDDEN, device=device, dtype=torch.bfloat16)
        made.append((x, pack_swiglu(gate, up, down)))
    return made


def timed(call, made: list, seconds: float) -> float:
    return time_calls([lambda x=x, w=w: call(x, w) for x, w in made], seconds=seconds, min_samples=8).p50


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--sweep", is_flag=True)
@click.option("--skinny-only", is_flag=True)
def main(out: Path, sweep: bool, skinny_only: bool) -> None:
    device, facts = "cuda", environment()
    bandwidth, rate = read_bandwidth(device), matmul_rate(torch.bfloat16, device)
    print(f"read bandwidth {bandwidth / 1e12:.3f} TB/s, bf16 products {rate / 1e12:.0f} TFLOP/s")
    with open(out, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["rows", "hidden", "width", "megabytes", "way", "config", "seconds", "share_of_measured",
                         "share_of_datasheet", *facts])  # fmt: skip
        for rows, width in SKINNY + ([] if skinny_only else LARGE):
            made = operands(rows, width, device)
            config = choose(rows, HIDDEN, width)
            if sweep and rows <= 64:
                tries = {}
                for tile in map(Config._make, TILES):
                    try:
                        gate_up = [lambda x=x, w=w, t=tile: fused_gate_up(x, w.gate_up, t) for x, w in made]
                        tries[tile] = time_calls(gate_up, seconds=0.01, min_samples=4).p50
                    except Exception as error:  # a tile that does not compile or fit is out of the race
                        print("  skipped", tile, type(error).__name__)
                plain = time_calls([lambda x=x, w=w: F.linear(x, w.gate_up) for x, w in made], seconds=0.01).p50
                best = sorted(tries, key=tries.__getitem__)[:3]
                print(f"  {rows}x{width} gate_up alone: cuBLAS {1e6 * plain:.1f} us;",
                      ", ".join(f"{tuple(t)} {1e6 * tries[t]:.1f}" for t in best))  # fmt: skip
                config = best[0] if best else None
            for way, call in ways(config if rows <= 64 else None).items():
                seconds = timed(call, made, 0.03)
                amount = 6 * HIDDEN * width  # bytes of the weights; as many FLOP a row
                own, peak = (bandwidth, 4.8e12) if rows <= 64 else (rate, 989e12)
                amount *= 1 if rows <= 64 else rows
                share = amount / seconds / own
                row = [rows, HIDDEN, width, round(6e-6 * HIDDEN * width, 1), way,
                       "" if way != "fused" else "/".join(map(str, config)), f"{seconds:.4g}", f"{share:.3f}",
                       f"{amount / seconds / peak:.3f}"]  # fmt: skip
                writer.writerow([*row, *facts.values()])
                print(*row, flush=True)
            del made


if __name__ == "__main__":
    main()
