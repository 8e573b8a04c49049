"""The routing of a mixture on this GPU in bf16: our kernels beside the PyTorch operations that they replace.

`route`: from the router's logits to a token's experts, their weights and the rows in the order of experts; `combine`: from what experts
gave to their tokens; `sub-block`: all of it with norm, router, experts and the shared expert, routed by our kernels whatever the number
of tokens, or by none. Bytes: logits, what experts gave and the tokens' sums; of the sub-block the matrices of all experts that any token
has. Each call has other tokens, so that experts' matrices come from memory; calls are replayed as one CUDA graph; p50 of replays.
`MAX_ROWS` in kernels/routing.py is up to how many tokens ours is faster, `ONE_PROGRAM` up to how many tokens times experts one program is
faster than two kernels; in the committed figures, taken while that was 2,048, `puzzle` is one program up to there, the
measured ceiling is a copy's bandwidth, and 2 and 4 tokens lack.

    python benchmarks/kernels/bench_routing.py --out benchmarks/results/routing.csv
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from ceilings import read_bandwidth
from kernel_report import BANDWIDTH, Report
from puzzle.blocklib.fast import moe as fast_moe
from puzzle.blocklib.fast.batch import make_fast, new_batch
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.plain.moe import Experts, SparseMoe, sorted_by_expert
from puzzle.blocklib.plain.part import loaded
from puzzle.kernels.routing import combine, route
from puzzle.kernels.timer import time_calls
from puzzle.parents.known import known_structure

MODELS = ("qwen3-30b-a3b", "nemotron-3-nano-30b-a3b")
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
COPIES = 4
BOTH_WAYS = 2048  # tokens times experts up to which both are timed
DEVICE = "cuda"


def mixture(model: str) -> Moe:
    """Of a model, all of whose mixtures are alike."""
    return next(s for layer in known_structure(model).layers for s in layer.values() if isinstance(s, Moe))


def filled(sub_block: Moe) -> SparseMoe:
    """Random weights, in which experts have even chances."""
    weights = {n: torch.empty(s, device=DEVICE, dtype=torch.bfloat16) for n, s in sub_block.tensors().items()}
    for name, tensor in weights.items():
        tensor.normal_(std=tensor.shape[-1] ** -0.5) if tensor.ndim > 1 else tensor.fill_("norm" in name)
    part = loaded(sub_block, weights)
    assert isinstance(part, SparseMoe)
    return part


def routed_by_torch(part: SparseMoe, logits: Tensor) -> tuple[Tensor, ...]:
    """What `Router` does after its product, and what products of experts then ask for."""
    own = part.sub_block
    assert isinstance(own, Moe)
    scores = logits.sigmoid() if own.router == "sigmoid" else logits.softmax(-1, dtype=torch.float32)
    chosen, weights = part.gate.choose(scores)
    order, ends = sorted_by_expert(chosen, own.num_experts)
    return order, order // chosen.shape[1], ends.int(), weights


def with_limit(limit: int, call: Callable[[], object]) -> object:
    """A call of the fast runtime in which so many rows are few."""
    fast_moe.MAX_ROWS = limit
    return call()


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(out: Path) -> None:
    report = Report(out, ["model", "tokens", "part"], read_bandwidth(DEVICE), BANDWIDTH)
    for model in MODELS:
        sub_block = mixture(model)
        part = filled(sub_block)
        hidden, experts, count = sub_block.hidden_size, sub_block.num_experts, sub_block.num_experts_per_tok
        for tokens in TOKENS:
            batch = new_batch(tokens, 1, {}, DEVICE)
            fast = make_fast(part, batch)
            assert isinstance(fast, fast_moe.FastMoe)
            streams = [torch.randn(2, tokens, hidden, device=DEVICE).bfloat16() for _ in range(COPIES)]
            logits = [fast.logits(s[0]) for s in streams]
            given = [torch.randn(tokens * count, hidden, device=DEVICE).bfloat16() for _ in range(COPIES)]
            ours = [route(x, count, **fast.rules) for x in logits]
            torchs = [routed_by_torch(part, x) for x in logits]
            whole = [partial(fast.decode, (s[0], s[1]), batch) for s in streams]
            chosen = sum(r.ends.diff(prepend=r.ends.new_zeros(1)).count_nonzero().item() for r in ours) / COPIES
            matrices = 2 * chosen * len(sub_block.matrices) * sub_block.expert_size * sub_block.moe_intermediate_size
            size = tokens * experts * logits[0].element_size()
            ones = {"puzzle, one program": True, "puzzle, two kernels": False} if tokens * experts <= BOTH_WAYS else {}
            ways = {
                "route": {
                    "puzzle": [partial(route, x, count, **fast.rules) for x in logits],
                    "torch": [partial(routed_by_torch, part, x) for x in logits],
                    **{
                        way: [partial(route, x, count, one_program=one, **fast.rules) for x in logits]
                        for way, one in ones.items()
                    },
                },
                "combine": {
                    "puzzle": [partial(combine, g, r.back, r.weights) for g, r in zip(given, ours, strict=True)],
                    "torch": [partial(Experts.summed, g, r[0], r[3]) for g, r in zip(given, torchs, strict=True)],
                },
                "sub-block": {
                    "puzzle": [partial(with_limit, tokens, call) for call in whole],
                    "torch": [partial(with_limit, 0, call) for call in whole],
                },
            }
            sizes = {"route": size, "combine": 2 * tokens * hidden * (count + 1), "sub-block": matrices}
            for name, found in ways.items():
                for way, calls in found.items():
                    seconds = time_calls(calls, seconds=0.05, min_samples=8).p50
                    report.add([model, tokens, name], way, seconds, sizes[name])
        del part, fast, whole, ways


if __name__ == "__main__":
    main()
