"""The experts of a mixture on this GPU in bf16: our products beside torch's grouped ones and a loop over experts.

Time of gathering, gate, up, activation and down for tokens whose experts are chosen evenly at random, without router and sum; FLOP
of the products over it, as a share of a square product's rate in the same run and of the datasheet; `bytes_share`: bytes of the matrices
of all experts that any token has over the time, as a share of the bandwidth that reading has. The loop knows the numbers of rows beforehand,
which nobody does who has to ask the GPU. Each call has other tokens and other experts, so that matrices come from memory; calls are
replayed as one CUDA graph; p50 of replays. `error` is relative, of the norm, from the loop in float32. `ratio` is torch's grouped products over ours: where it is above 1, `FASTER` in kernels/grouped.py
takes its `rows_per_expert`.

    python benchmarks/kernels/bench_grouped.py --out benchmarks/results/grouped.csv [--sweep]
"""

from __future__ import annotations

import csv
import sys
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import environment, matmul_rate, read_bandwidth
from kernel_report import BF16
from puzzle.blocklib.plain.moe import sorted_by_expert
from puzzle.kernels.grouped import Tile, activated, choose_tile, grouped_linear
from puzzle.kernels.timer import time_calls

SHAPES = {  # hidden size, channels of an expert, experts, of a token, activation
    "nemotron-3-nano-30b-a3b": (2688, 1856, 128, 6, "relu2"),
    "qwen3-30b-a3b": (2048, 768, 128, 8, "silu"),
}
TOKENS = (1, 8, 64, 512, 4096)
COPIES = 4  # routings in turn; one layer's matrices are 10 and more times the L2
TILES = [Tile(*t) for t in product((16, 32, 64, 128), (64, 128), (64, 128), (4, 8), (3, 4))]


class Call:
    """Tokens and their experts, and the three ways."""

    def __init__(self, tokens: int, chosen: Tensor, weights: dict[str, Tensor], activation: str):
        self.weights, self.activation, self.gate = weights, activation, weights.get("gate")
        count, hidden = len(weights["up"]), weights["up"].shape[2]
        self.x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        order, self.ends = sorted_by_expert(chosen, count)
        self.place, self.offsets = order // chosen.shape[1], self.ends.int()
        self.sizes = [b - a for a, b in pairwise([0, *self.ends.tolist()])]

    def ours(self, tile: Tile | None = None) -> Tensor:
        options = {"place": self.place, "gate": self.gate, "activation": self.activation}
        inner = grouped_linear(self.x, self.weights["up"], self.ends, tile=tile, **options)
        return grouped_linear(inner, self.weights["down"], self.ends, tile=tile)

    def grouped(self) -> Tensor:
        rows = self.x[self.place]

        def apply(x: Tensor, name: str) -> Tensor:
            return torch._grouped_mm(x, self.weights[name].mT, offs=self.offsets)

        gate = None if self.gate is None else apply(rows, "gate")
        return apply(activated(gate, apply(rows, "up"), self.activation), "down")

    def loop(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        found = []
        for expert, rows in enumerate(self.x[self.place].to(dtype).split(self.sizes)):
            if len(rows):
                own = {name: weight[expert].to(dtype) for name, weight in self.weights.items()}
                gate = None if self.gate is None else F.linear(rows, own["gate"])
                found.append(F.linear(activated(gate, F.linear(rows, own["up"]), self.activation), own["down"]))
        return torch.cat(found)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--sweep", is_flag=True, help="Try every tile, and print the three best of each point.")
def main(out: Path, sweep: bool) -> None:
    rate, bandwidth, facts = matmul_rate(), read_bandwidth("cuda"), environment()
    columns = ["model", "tokens", "rows_per_expert", "way", "tile", "seconds", "ratio", "error", "bytes_share"]
    with open(out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([*columns, "share_of_measured", "share_of_datasheet", *facts])
        for model, (hidden, width, count, chosen, activation) in SHAPES.items():
            names = ("up", "down") if activation == "relu2" else ("up", "down", "gate")
            shapes = {name: (count, hidden, width) if name == "down" else (count, width, hidden) for name in names}
            weights = {n: torch.randn(s, device="cuda", dtype=torch.bfloat16) / s[2] ** 0.5 for n, s in shapes.items()}
            for tokens in TOKENS:
                routed = [torch.rand(tokens, count, device="cuda").topk(chosen)[1] for _ in range(COPIES)]
                calls = [Call(tokens, one, weights, activation) for one in routed]
                tile = choose_tile(tokens * chosen, count)
                tries: dict[Tile, float] = {}
                for other in TILES if sweep else []:
                    try:
                        ours = [partial(c.ours, other) for c in calls]
                        tries[other] = time_calls(ours, seconds=0.02, min_samples=4).p50
                    except Exception as failed:  # a tile that does not compile or fit is out of the race
                        print("  skipped", other, type(failed).__name__)
                for best in sorted(tries, key=tries.__getitem__)[:3]:
                    print("   ", tuple(best), f"{1e6 * tries[best]:.1f} us")
                tile = min(tries, key=tries.__getitem__) if tries else tile
                want = calls[0].loop(torch.float32)
                ways: dict[str, list[partial[Tensor]]] = {
                    "torch": [partial(c.grouped) for c in calls],
                    "loop": [partial(c.loop) for c in calls],
                }
                ways["puzzle"] = [partial(c.ours, tile) for c in calls]
                flop = 2 * tokens * chosen * hidden * width * len(names)
                used = sum(sum(size > 0 for size in c.sizes) for c in calls) / len(calls)
                first = 0.0
                for way, made in ways.items():
                    seconds = time_calls(made, seconds=0.1, min_samples=8).p50
                    first = first or seconds
                    error = ((made[0]().float() - want).norm() / want.norm()).item()
                    size = 2 * used * hidden * width * len(names)
                    row = [model, tokens, tokens * chosen / count, way, "/".join(map(str, tile)) if way == "puzzle" else "",
                           f"{seconds:.4g}", f"{first / seconds:.3f}", f"{error:.1e}", f"{size / seconds / bandwidth:.3f}",
                           f"{flop / seconds / rate:.3f}", f"{flop / seconds / BF16:.3f}"]  # fmt: skip
                    writer.writerow([*row, *facts.values()])
                    handle.flush()
                    print(*row, flush=True)
            del weights


if __name__ == "__main__":
    main()
