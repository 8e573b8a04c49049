"""Decode latency of fused against unfused FFNs on GPUs, with random weights of the real shapes.

Protocol: a decode step of the whole stack (embedding, layers, final norm, head, argmax) over --context cached tokens, captured
as a CUDA graph and replayed --steps times; p20, p50 and p80 of the replays. Weights of different layers are different memory,
far more than any cache holds, so every layer reads cold weights. Attention-free layers stand together in the middle of the
stack and are fused in twos, in fours, and all in one; `parent` has attention everywhere, `unfused` lost it in those layers.
FFN widths of the attention-free layers: the parent's (x1) and half of it (x0.5).
    llama-3.1-8b        32 layers, 12 of them without attention
    llama-3.1-405b-tp8  one GPU's share of eight: hidden 16384, FFN 6656, 16 heads, 1 KV head; 24 layers, 12 without attention
One GPU: no all-reduce. Under `torchrun --nproc-per-node N … --tp N`: one NCCL all-reduce inside the graph after every
attention and every FFN, as tensor parallelism has it, so that n layers fused into one save n - 1 of them; the 8B shape is
divided by N, the 405B shares stay shares of eight, whose sums then go over N GPUs. What was measured before 2026-11-28 lacks the sums of
embedding and head, two small ones a step. Rank 0 writes the slowest rank's percentiles, row by row, so that a run cut off leaves what it had. `--append` adds to the CSV; rows of
the same point measured before are replaced.

    PYTHONPATH=. python benchmarks/speed/bench_fusion_latency.py --csv benchmarks/results/fusion_latency.csv
    NCCL_NVLS_ENABLE=0 PYTHONPATH=. torchrun --nproc-per-node N benchmarks/speed/bench_fusion_latency.py --tp N \\
        --fractions 1 --append --csv benchmarks/results/fusion_latency.csv                        # N = 2, 4
    PYTHONPATH=. python benchmarks/speed/bench_fusion_latency.py --device cpu --shapes reference --batches 1 --steps 5 --csv /tmp/x.csv
    PYTHONPATH=. torchrun --nproc-per-node 2 benchmarks/speed/bench_fusion_latency.py --tp 2 --device cpu --shapes reference \\
        --batches 1,4 --steps 5 --csv /tmp/x.csv                                          # two processes of a CPU, gloo
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from point_table import PointTable, Row
from puzzle.base.device import short_name
from puzzle.base.ranks import Ranks
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.known import known_structure
from puzzle.parents.structure import Layer, Structure
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import CausalModel, random_model
from puzzle.runtime.parallel import joined
from rank_steps import ending_all, percentiles, timed

LAYERS = {"llama-3.1-8b": (32, 12), "llama-3.1-405b-tp8": (24, 12)}  # all, without attention; others: all, half
GROUPS = {"parent": 0, "unfused": 1, "twos": 2, "fours": 4, "one": -1}
COLUMNS = (
    "shapes,ffn_of_attention_free,fusion,num_layers,batch,context,tp,all_reduces_per_token,weight_bytes,"
    "p20_s,p50_s,p80_s,speedup_over_unfused,speedup_over_parent,device,versions,date"
)
POINT = ("shapes", "ffn_of_attention_free", "fusion", "num_layers", "batch", "context", "tp", "device")


def share(structure: Structure, name: str, tp: int) -> Structure:
    """One rank's part of the usual layer, and of the vocabulary; embedding and head are one matrix. Those named -tpN are such
    parts already."""
    own = replace(structure, tied=True, layers=(structure.usual,))
    return own if "-tp" in name else own.share(tp)


def layers_of(full: Layer, count: int, free: int, fusion: str, fraction: float) -> list[Layer]:
    """`count` layers, before fusion, with the attention-free ones in the middle. full: a layer with attention."""
    ffn, group = full["ffn"], GROUPS[fusion]
    assert isinstance(ffn, SwiGLU)
    before = (count - free) // 2
    middle = [full] * free
    if group != 0:
        size = free if group < 0 else group
        wide = replace(ffn, intermediate_size=size * int(fraction * ffn.intermediate_size))
        middle = [{"attention": NO_OP, "ffn": wide}] * (free // size)
    return [full] * before + middle + [full] * (count - free - before)


def measure(model: CausalModel, batch: int, context: int, steps: int, ranks: Ranks | None) -> list[float]:
    runtime = FastRuntime(model, batch, context + 2, ranks=ranks)
    runtime.randomize()
    runtime.at(context)
    with torch.inference_mode():
        return percentiles(runtime.replayed(runtime.step_in_place, warm_ups=3), steps, runtime.device, ranks)


def fill_speedups(rows: list[Row]) -> None:
    """Of every row over the unfused one and over the parent of the same shapes, batch and GPUs."""
    for one in rows:
        for base, fraction in (("unfused", one["ffn_of_attention_free"]), ("parent", "x1")):
            wanted = one | {"fusion": base, "ffn_of_attention_free": fraction}
            found = [r for r in rows if all(r[k] == wanted[k] for k in POINT if k != "num_layers")]
            one[f"speedup_over_{base}"] = f"{float(found[0]['p50_s']) / float(one['p50_s']):.4f}" if found else ""


@click.command()
@click.option("--shapes", "names", default="llama-3.1-8b,llama-3.1-405b-tp8", show_default=True)
@click.option("--batches", default="1,16,64", show_default=True)
@click.option("--fractions", default="1,0.5", show_default=True, help="FFN width of attention-free layers.")
@click.option("--context", type=int, default=1024, show_default=True)
@click.option("--steps", type=int, default=100, show_default=True)
@click.option("--tp", type=int, default=1, show_default=True, help="Ranks, under torchrun.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--csv", "path", type=click.Path(path_type=Path), default=Path("benchmarks/results/fusion_latency.csv"))
@click.option("--append", is_flag=True, help="Keep the rows that are in the CSV.")
@click.option("--go-on", is_flag=True, help="And do not measure their points again.")
def main(
    names: str,
    batches: str,
    fractions: str,
    context: int,
    steps: int,
    tp: int,
    device: str,
    path: Path,
    append: bool,
    go_on: bool,
) -> None:
    with ending_all(), joined(tp, "gpu" if device == "cuda" else "cpu") as (ranks, where):
        first = ranks is None or ranks.is_first
        table = PointTable(path, COLUMNS, POINT, append=append or go_on, writes=first, fill=fill_speedups)
        sizes = [int(b) for b in batches.split(",")]
        for name in names.split(","):
            for fraction in map(float, fractions.split(",")):
                latencies(name, fraction, sizes, context, steps, ranks, where, table, go_on)


def latencies(
    name: str,
    fraction: float,
    batches: list[int],
    context: int,
    steps: int,
    ranks: Ranks | None,
    device: torch.device,
    table: PointTable,
    go_on: bool,
) -> None:
    """All ways of fusing one shape's attention-free layers of one width, at all batches. go_on: that the table does not have."""
    tp = 1 if ranks is None else ranks.world
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    whole = known_structure(name)
    count, free = LAYERS.get(name, (whole.num_layers, whole.num_layers // 2 // 4 * 4))
    own = share(whole, name, tp)
    for fusion in ("parent", "unfused", "twos", "fours", "one"):
        if fusion == "parent" and fraction != 1:
            continue
        point = {"shapes": name, "ffn_of_attention_free": f"x{fraction:g}", "fusion": fusion, "context": str(context),
                 "tp": str(tp), "device": short_name(device)}  # fmt: skip
        left = [batch for batch in batches if not (go_on and table.has(**point, batch=str(batch)))]
        if not left:
            continue
        begin = time.perf_counter()
        structure = own.with_layers(layers_of(own.layers[0], count, free, fusion, fraction))
        num_sums = sum(not isinstance(sub_block, NoOp) for _, _, sub_block in structure) if tp > 1 else 0
        model = random_model(structure, device, dtype)
        for batch in left:
            found = measure(model, batch, context, steps, ranks)
            table.add(
                point
                | {
                    "num_layers": str(structure.num_layers),
                    "batch": str(batch),
                    "all_reduces_per_token": str(num_sums),
                    "weight_bytes": str(model.weight_bytes),
                    **timed(found, device, tp),
                }
            )
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if table.writes:
            print(f"  {fusion}: {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
