"""`puzzle profile --tp N --all-reduce`, under torchrun: what summing over the GPUs of this host takes, by message size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from puzzle.base.device import check_gpu, name_of
from puzzle.base.errors import UserError
from puzzle.base.files import check_writable
from puzzle.base.ranks import Ranks
from puzzle.kernels.timer import Graph, time_replays
from puzzle.profile.all_reduce import FOLDER, AllReduceRow, read_all_reduces, write_all_reduces
from puzzle.runtime.parallel import joined, nccl_words

SIZES = tuple(size for power in range(6, 30) for size in (2**power, 3 * 2 ** (power - 1)))  # bytes: 64 B to 768 MiB
CALLS, GRAPH_BYTES = 50, 2**32  # of one graph: so many all-reduces, fewer of large messages
REPLAYS = 10
MATRIX = {True: (4096, 8192), False: (16, 16)}  # 64 MiB, more than an L2 holds: about 25 us on an H100


def measure_all_reduces(gpu: str, tp: int, out: Path, sizes: tuple[int, ...] = SIZES) -> tuple[Path, dict[str, Any]]:
    """Write the rows of `tp` ranks into out/all_reduce/GPU.csv, beside those of other numbers of ranks.

    gpu: this machine's, or cpu, over gloo, to rehearse. Raises UserError without as many processes and GPUs.
    """
    if tp == 1:
        raise UserError("`all_reduce` needs `tp`: say between how many GPUs, such as --tp 2")
    with joined(tp, gpu) as (ranks, device):
        assert ranks is not None
        if device.type == "cuda":
            check_gpu(gpu)
        path = out / FOLDER / f"{gpu.split('-')[0]}.csv"
        check_writable(path.parent)
        facts = {
            "device": name_of(device),
            "versions": f"torch {torch.__version__}{nccl_words(device)}",
            "date": time.strftime("%Y-%m-%d"),
        }
        rows = [AllReduceRow(tp=tp, num_bytes=size, seconds=one(ranks, size, device), **facts) for size in sizes]
        if ranks.is_first:
            others = [row for row in (read_all_reduces(path) if path.is_file() else []) if row.tp != tp]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_all_reduces(path, sorted([*others, *rows], key=lambda row: (row.tp, row.num_bytes)))
        return path, {**facts, "tp": tp, "points": len(rows), "smallest_us": 1e6 * rows[0].seconds}


@torch.inference_mode()
def one(ranks: Ranks, num_bytes: int, device: torch.device) -> float:
    """Median seconds that an all-reduce adds to a product of a matrix in a CUDA graph of many such pairs, of the slowest rank: between
    products, as in a model, small ones take less than one after another."""
    cuda = device.type == "cuda"
    message = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
    matrix = torch.zeros(*MATRIX[cuda], dtype=torch.bfloat16, device=device)
    vector, product = matrix[0].clone(), matrix[:, 0].clone()
    rounds = max(1, min(CALLS, GRAPH_BYTES // num_bytes)) if cuda else 1

    def alone() -> None:
        torch.mv(matrix, vector, out=product)

    def pair() -> None:
        alone()
        ranks.sum(message)

    graphs = [Graph(call, device, warm_ups=3, rounds=rounds) for call in (pair, alone)]
    # As many on every rank.
    both, less = (time_replays(graph.replay, rounds, device, 0.0, REPLAYS).p50 for graph in graphs)
    return max(1e-7, ranks.slowest([both - less])[0])
