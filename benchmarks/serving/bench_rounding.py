"""How far right answers in bf16 lie from one another: tiny children in our own plain forward, on a CPU, rounded in several ways.

    python benchmarks/serving/bench_rounding.py [--children NAME ...] [--runs 16]

Protocol: as `serving_matrix.py --gpu` has it: children with heads of 64, 32 prompts of 17 to 3,000 tokens, 24 greedy tokens of the float32
reference and its 20 likeliest words at each. Run 0 is plain bf16; in the others a third of what every sub-block adds is moved by one unit in
the last place (`puzzle/serving/roundings.py`), by seeds 1, 2, ... Printed of each run: mean |Δ log p| after the prompts and while they are
continued, the three largest prompts' and the median prompt's, both `after`. At the end: prompts, over all runs, by whether a router gives their
last token other experts than in float32. Products of matrices are made in float32 of the rounded values and rounded once, which is several
times as fast where a CPU has no bf16. Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.blocklib.plain.moe import Router
from puzzle.runtime.model import CausalModel
from puzzle.runtime.plain import PlainRuntime
from puzzle.serving.batch import log_probs, plan_batches
from puzzle.serving.reference import find_export, load_reference
from puzzle.serving.roundings import round_to, rounded_otherwise
from tiny_children import ALL, write_tiny_child

CHILDREN = ("qwen3_moe", "nemotron-h, experts", "qwen3-moe, alike", "kv-heads", "nemotron-h, dense")
LINEAR = F.linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, made in float32."""
    if x.dtype == torch.float32:
        return LINEAR(x, weight, bias)
    return LINEAR(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def greedy(model: CausalModel, prompts: list[list[int]], count: int) -> Tensor:
    """[P, count]"""
    return torch.cat([PlainRuntime(model, 1, len(p) + count).generate(torch.tensor([p]), count) for p in prompts])


def likeliest(model: CausalModel, prompts: list[list[int]], texts: Tensor, top: int) -> Tensor:
    """[P, N, top]"""
    every = torch.arange(len(model.embedding.weight)).expand(*texts.shape, -1)
    return log_probs(model, prompts, texts, every)[1].topk(top).indices


@contextmanager
def choices(model: CausalModel, prompts: list[list[int]]) -> Iterator[list[list[tuple[int, ...]]]]:
    """While it is open: by prompt, the experts of its last token in each layer that has some."""
    found: list[list[tuple[int, ...]]] = []

    def start(module: Any, given: Any) -> None:
        found.append([])

    def note(module: Any, given: Any, out: tuple[Tensor, Tensor]) -> None:
        last = out[0][len(prompts[len(found) - 1]) - 1]
        found[-1].append(tuple(sorted(last.tolist())))

    hooks = [model.blocks[0].register_forward_pre_hook(start)]
    hooks += [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure(name: str, path: Path, num_runs: int) -> None:
    """One child, printed. path: its --format hf export."""
    export = find_export(path)
    model, asked = load_reference(export), plan_batches(export)["gpu"]
    prompts = asked["prompts"]
    texts = greedy(model, prompts, asked["num_tokens"])
    words = likeliest(model, prompts, texts, asked["top"])
    with choices(model, prompts) as right:
        ours = log_probs(model, prompts, texts, words)[:2]
    round_to(model, torch.bfloat16)
    same: list[float] = []
    other: list[float] = []
    for seed in range(num_runs):
        rounding = rounded_otherwise(model, seed) if seed else nullcontext()
        with choices(model, prompts) as chosen, mock.patch.object(F, "linear", linear), rounding:
            theirs = log_probs(model, prompts, texts, words)[:2]
        after = (theirs[0] - ours[0]).abs().mean(-1)
        during = (theirs[1] - ours[1]).abs().mean()
        largest = ", ".join(f"{value:.3f}" for value in after.topk(3).values.tolist())
        each = f"prompts: {largest}; median {after.median():.4f}"
        print(f"{name:<20} {seed:>3} after {after.mean():.4f} ({each}) during {during:.4f}", flush=True)
        for value, before, now in zip(after.tolist(), right, chosen, strict=True):
            (same if before == now else other).append(value)
    for what, values in (("the same", same), ("other", other)):
        if values and other:
            print(f"{name:<20} {len(values)} of {len(same + other)} prompts with {what} experts: {sum(values) / len(values):.4f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--children", nargs="+", default=list(CHILDREN), choices=list(ALL))
    parser.add_argument("--runs", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-rounding-") as temporary:
        for name in arguments.children:
            measure(name, write_tiny_child(name, Path(temporary) / name, gpu=True), arguments.runs)


if __name__ == "__main__":
    main()
