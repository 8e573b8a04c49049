"""The published 253B child of Llama-3.1-405B beside its parent, and beside itself before its FFNs were fused: decode steps of the whole stacks.

Protocol: a rank's share of every sub-block with random weights, a decode step over --context cached tokens as one CUDA graph, replayed
--steps times; the slowest rank's p20, p50 and p80, as `bench_fusion_latency.py` has them. All layers are run. What no card holds, and four
cannot hold together, is the weights: different ones are made up to --memory GB of bf16 (which fp8 then halves), and from there on
layers of the same shape take turns with these and with their caches. One share has several times what the L2 cache holds, so that each is read
from memory again; `distinct_weight_bytes` says how much there was of `weight_bytes`.

The child's structure: 64 layers with attention and 253.401 B parameters, as llama.cpp prints of nvidia/Llama-3_1-Nemotron-Ultra-253B-v1
(ggml-org/llama.cpp#12843, ikawrakow/ik_llama.cpp#377), whose counts of tensors give 81 FFNs; four of them stand for 49 that were fused
(arXiv 2503.18908) and have 399,360, 425,984, 343,040 and 301,056 channels. The widths of the other 77, and of the 49 before they were fused, are not
those of the model: they are as equal as multiples of 1,024 can be, with the sum that the parameters leave. The papers (arXiv 2503.18908, 2505.00949) say 1.71 times lower latency than the parent at TP 8, and 1.119 of it by
fusion, so 1.53 without.

    NCCL_NVLS_ENABLE=0 PYTHONPATH=. torchrun --nproc-per-node 8 benchmarks/speed/bench_published_child.py --tp 8 --append \\
        --csv benchmarks/results/published_child.csv
    NCCL_NVLS_ENABLE=0 PYTHONPATH=. torchrun --nproc-per-node 4 benchmarks/speed/bench_published_child.py --tp 4 --shares 8,4 --append \\
        --csv benchmarks/results/published_child.csv                                    # of eight: their sums go over four
    PYTHONPATH=. torchrun --nproc-per-node 4 benchmarks/speed/bench_published_child.py --tp 4 --small --csv /tmp/x.csv    # on a CPU
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from point_table import PointTable, Row
from puzzle.base.device import short_name
from puzzle.base.ranks import Ranks
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.known import known_structure
from puzzle.parents.structure import Structure
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import random_model
from puzzle.runtime.parallel import joined
from rank_steps import ending_all, percentiles, timed

COLUMNS = (
    "model,precision,tp,shares,batch,context,num_attentions,num_ffns,parameters_B,all_reduces_per_token,weight_bytes,distinct_weight_bytes,"
    "p20_s,p50_s,p80_s,speedup_over_parent,speedup_over_unfused,device,versions,date"
)
POINT = ("model", "precision", "tp", "shares", "batch", "context", "device")
MODELS = ("parent", "unfused", "fused")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A child of `parent` by what is known of it: so many attentions, FFNs of the widths `fused` in place of num_fused ones, and num_others
    more FFNs with other_channels between them. unit: divides every width."""

    parent: str
    num_attentions: int
    num_others: int
    other_channels: int
    num_fused: int
    fused: tuple[int, ...]
    unit: int

    def ffns(self, model: str) -> list[int]:
        """Widths of the child's FFNs, in order."""
        others = split(self.other_channels, self.num_others, self.unit)
        return others + (list(self.fused) if model == "fused" else split(sum(self.fused), self.num_fused, self.unit))

    def structure(self, model: str) -> Structure:
        """The parent, or the child with its FFNs fused or not yet. Attention-free layers stand at the end: their place changes no time."""
        whole = known_structure(self.parent)
        attention, ffn = whole.usual["attention"], whole.usual["ffn"]
        if model == "parent":
            return whole
        widths = self.ffns(model)
        attentions = [attention] * self.num_attentions + [NO_OP] * (len(widths) - self.num_attentions)
        slots = zip(attentions, widths, strict=True)
        return whole.with_layers([{"attention": a, "ffn": replace(ffn, intermediate_size=w)} for a, w in slots])  # type: ignore[call-arg]


ULTRA = Published(
    parent="llama-3.1-405b",
    num_attentions=64,
    num_others=77,
    other_channels=2791 * 1024,  # with which it has 253.4 B parameters
    num_fused=49,
    fused=(399_360, 425_984, 343_040, 301_056),
    unit=1024,
)
SMALL = Published(
    parent="reference", num_attentions=8, num_others=10, other_channels=4800, num_fused=6, fused=(2080, 1600), unit=32
)


def split(total: int, count: int, unit: int) -> list[int]:
    """`total` as `count` multiples of `unit` that are as equal as can be."""
    each, more = divmod(total // unit, count)
    return [unit * (each + (index < more)) for index in range(count)]


def distinct(sub_blocks: Sequence[SubBlock], memory: float) -> tuple[list[int], list[int]]:
    """Which sub-blocks have weights of their own, up to `memory` bytes of bf16 and at least one of each shape; and for every sub-block the place of
    the one among these whose weights it takes, the one used longest ago."""
    made: list[int] = []
    places: list[int] = []
    by_key: dict[str, list[int]] = {}
    spent = sum(2 * b.num_parameters for b in {b.key(): b for b in sub_blocks}.values())
    for index, sub_block in enumerate(sub_blocks):
        own, size = by_key.setdefault(sub_block.key(), []), 2 * sub_block.num_parameters
        if own and spent + size > memory:
            own.append(own.pop(0))
        else:
            spent += size if own else 0
            own.append(len(made))
            made.append(index)
        places.append(own[-1])
    return made, places


def stack(
    share: Structure, memory: float, batch: int, context: int, fp8: bool, ranks: Ranks | None, device: torch.device
) -> tuple[FastRuntime, int]:
    """A rank's stack at a decode step, and the bytes of its different weights."""
    chain = [b for layer in share.layers for b in layer.values() if b is not NO_OP]
    made, places = distinct(chain, memory)
    own = share.with_layers([{"ffn": chain[n]} for n in made])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runtime = FastRuntime(random_model(own, device, dtype), batch, context + 2, fp8=fp8, consume=True, ranks=ranks)
    runtime.parts = [runtime.parts[place] for place in places]
    runtime.at(context)
    return runtime, weight_bytes(own, fp8, dtype)


def weight_bytes(share: Structure, fp8: bool, dtype: torch.dtype) -> int:
    """Embedding and head, one matrix here, stay in `dtype`."""
    layers = sum(b.num_parameters for _, _, b in share)
    return share.num_fixed_parameters * dtype.itemsize + layers * (1 if fp8 else dtype.itemsize)


def fill_speedups(rows: list[Row]) -> None:
    for one in rows:
        for base in ("parent", "unfused"):
            wanted = one | {"model": base}
            found = [r for r in rows if all(r[k] == wanted[k] for k in POINT)]
            one[f"speedup_over_{base}"] = f"{float(found[0]['p50_s']) / float(one['p50_s']):.4f}" if found else ""


def measure(
    published: Published, model: str, shares: int, precision: str, batches: Sequence[int], context: int, steps: int, memory: float,
    ranks: Ranks | None, device: torch.device, table: PointTable,
) -> None:  # fmt: skip
    """One model's steps at all batches."""
    whole, fp8, tp = published.structure(model), precision == "fp8", 1 if ranks is None else ranks.world
    share = replace(whole, tied=True).share(shares)  # one matrix for both ends takes the time of two
    for batch in batches:
        begin = time.perf_counter()
        runtime, held = stack(share, memory, batch, context, fp8, ranks, device)
        runtime.randomize()
        with torch.inference_mode():
            replay = runtime.replayed(runtime.step_in_place, warm_ups=3)
            found = percentiles(replay, steps, device, ranks)
        table.add({
            "model": model,
            "precision": precision,
            "tp": str(tp),
            "shares": str(shares),
            "batch": str(batch),
            "context": str(context),
            "num_attentions": str(sum(layer["attention"] is not NO_OP for layer in whole.layers)),
            "num_ffns": str(sum(layer["ffn"] is not NO_OP for layer in whole.layers)),
            "parameters_B": f"{whole.num_parameters / 1e9:.3f}",
            "all_reduces_per_token": str(sum(b is not NO_OP for _, _, b in whole) if tp > 1 else 0),
            "weight_bytes": str(weight_bytes(share, fp8, runtime.embedding.dtype)),
            "distinct_weight_bytes": str(held),
            **timed(found, device, tp),
        })  # fmt: skip
        del runtime, replay
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if table.writes:
            print(f"  {model} at {batch}: {time.perf_counter() - begin:.1f} s", flush=True)


@click.command()
@click.option("--tp", type=int, default=1, show_default=True, help="Ranks, under torchrun.")
@click.option("--shares", "counts", help="A rank has one of so many shares, e.g. 8,4. Default: as --tp.")
@click.option("--precisions", default="fp8,bf16", show_default=True, help="Of weights and KV cache; the papers': fp8.")
@click.option("--batches", default="1,32", show_default=True)
@click.option("--context", type=int, default=1024, show_default=True)
@click.option("--steps", type=int, default=40, show_default=True)
@click.option("--memory", type=float, default=40.0, show_default=True, help="GB of different weights, in bf16.")
@click.option("--small", is_flag=True, help="A tiny parent on a CPU in float32, to rehearse.")
@click.option("--csv", "path", type=click.Path(path_type=Path), default=Path("benchmarks/results/published_child.csv"))
@click.option("--append", is_flag=True, help="Keep the rows that are in the CSV.")
@click.option("--go-on", is_flag=True, help="And do not measure their points again.")
def main(
    tp: int,
    counts: str | None,
    precisions: str,
    batches: str,
    context: int,
    steps: int,
    memory: float,
    small: bool,
    path: Path,
    append: bool,
    go_on: bool,
) -> None:
    published = SMALL if small else ULTRA
    if small:
        precisions, context, steps, memory = "float32", 16, 2, 2e-3
    with ending_all(), joined(tp, "cpu" if small else "gpu") as (ranks, device):
        first = ranks is None or ranks.is_first
        table = PointTable(path, COLUMNS, POINT, append=append or go_on, writes=first, fill=fill_speedups)
        for precision in precisions.split(","):
            for shares in (counts or str(tp)).split(","):
                for model in MODELS:
                    point = {"model": model, "precision": precision, "tp": str(tp), "shares": shares, "context": str(context),
                             "device": short_name(device)}  # fmt: skip
                    sizes = [int(b) for b in batches.split(",") if not (go_on and table.has(**point, batch=b))]
                    measure(
                        published, model, int(shares), precision, sizes, context, steps, memory * 1e9, ranks, device, table
                    )  # fmt: skip


if __name__ == "__main__":
    main()
