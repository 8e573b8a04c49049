"""What layers owe to earlier layers, measured on held-out text: the dependency matrix, and blocks run in parallel.

One pass over the child, a layer in memory at a time: beside the child's own residual stream go those in which one earlier
layer added nothing, kept in host memory. Letters: B sequences, T tokens, E hidden_size, L layers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.base.console import progress
from puzzle.blocklib.none import NoOp
from puzzle.export.walker import Walker
from puzzle.fuse.matrix import Matrix, Rows
from puzzle.runtime.divergence import Divergence


class _Sums:
    """Running sums of both measures over tokens, [L][L]; None where j adds nothing or i was never left out."""

    def __init__(self, num_layers: int):
        self.distance = torch.zeros(num_layers, num_layers, dtype=torch.float64)
        self.error, self.size = torch.zeros_like(self.distance), torch.zeros_like(self.distance)

    def add(self, i: int, j: int, own: Tensor, without: Tensor) -> None:
        """own, without [B, T, E]: what j adds with and without i."""
        own, without = own.float(), without.float()
        self.distance[i, j] += (1 - F.cosine_similarity(own, without, dim=-1)).sum(dtype=torch.float64).cpu()
        self.error[i, j] += (without - own).pow(2).sum(dtype=torch.float64).cpu()
        self.size[i, j] += own.pow(2).sum(dtype=torch.float64).cpu()

    def matrix(self, num_tokens: int) -> Matrix:
        return Matrix(
            dependency=self._rows(self.distance / num_tokens), relative_error=self._rows(self.error / self.size)
        )

    def _rows(self, values: Tensor) -> Rows:
        return [
            [max(0.0, value) if ok else None for value, ok in zip(row, oks, strict=True)]
            for row, oks in zip(values.tolist(), (self.size > 0).tolist(), strict=True)
        ]


@torch.no_grad()
def measure_dependency(walker: Walker, ffns: bool = False) -> tuple[Matrix, Matrix | None]:
    """(matrix of whole layers, that of FFNs alone or None). A layer's contribution is what it adds to the stream.

    Host memory: (L + 1)·B·T·E elements, twice that with `ffns`.
    """
    count = len(walker.child.layers)
    layers, alone = _Sums(count), _Sums(count)
    streams = walker.embedded()
    without: list[tuple[int, _Sums, list[Tensor]]] = []  # the layer left out, what is measured so, its stream
    with progress("dependency", count) as bar:
        for j, block in enumerate(walker.blocks()):
            bar.note(f"layer {j}")
            new = list(streams)
            new_ffn: list[Tensor] = []
            for batch, kept in enumerate(streams):
                x = kept.to(walker.device)
                attention, ffn = walker.added(block, x)
                for i, sums, stream in without:
                    other = stream[batch].to(walker.device)
                    own_attention, own_ffn = walker.added(block, other)
                    if sums is layers:
                        sums.add(i, j, attention + ffn, own_attention + own_ffn)
                    else:
                        sums.add(i, j, ffn, own_ffn)
                    stream[batch] = (other + own_attention + own_ffn).cpu()
                new_ffn.append((x + attention).cpu())
                streams[batch] = (x + attention + ffn).cpu()
            if not walker.child.layers[j].is_empty:
                without.append((j, layers, new))
            if ffns and not isinstance(walker.child.layers[j].ffn, NoOp):
                without.append((j, alone, new_ffn))
            bar.advance()
    num_tokens = sum(ids.numel() for ids in walker.ids)
    return layers.matrix(num_tokens), alone.matrix(num_tokens) if ffns else None


@torch.no_grad()
def parallel_divergence(walker: Walker, sets: list[list[int]]) -> list[dict[str, float]]:
    """For each set of layers i: the child's KL(child‖changed) when each i and i + 1 read the same input.

    A pair computes x + c_i(x) + c_{i+1}(x), with c what a whole block adds (arXiv 2503.18908, "parallelizing whole
    blocks"); sets hold disjoint pairs. Returns {"kl", "kl_stderr"} of each set, in nats per token.
    """
    own = walker.embedded()
    changed: list[list[Tensor] | None] = [None] * len(sets)
    before: dict[int, list[Tensor]] = {}  # per set, the input that a pair in hand shares
    count = len(walker.child.layers)
    with progress("in parallel", count) as bar:
        for j, block in enumerate(walker.blocks()):
            for number, pairs in enumerate(sets):
                stream, shared = changed[number], before.pop(number, None)
                if j in pairs:
                    before[number] = list(stream or own)
                if stream is None and shared is None:
                    continue  # the same as the child so far
                stream = stream or list(own)
                for batch, (x, read) in enumerate(zip(stream, shared or stream, strict=True)):
                    stream[batch] = (x.to(walker.device) + sum(walker.added(block, read.to(walker.device)))).cpu()
                changed[number] = stream
            for batch, x in enumerate(own):
                own[batch] = (x.to(walker.device) + sum(walker.added(block, x.to(walker.device)))).cpu()
            bar.advance()
    found = []
    for last in changed:
        meter = Divergence()
        for ids, x, y in zip(walker.ids, own, last or own, strict=True):
            meter.add(walker.ends, x.to(walker.device), walker.ends, y.to(walker.device), ids)
        result = meter.result()
        found.append({key: result[key] for key in ("kl", "kl_stderr")})
    return found


def parallel_report(walker: Walker) -> dict[str, Any]:
    """Every pair of neighbouring blocks in parallel, alone; and the best disjoint pairs together, one more at a time.

    {"pairs": [{"layers": [i, i+1], "kl", "kl_stderr"}], "together": [{"pairs": [[i, i+1], …], "kl", "kl_stderr"}]}
    """
    neighbours = enumerate(pairwise(walker.child.layers))
    busy = [i for i, (layer, next_layer) in neighbours if not (layer.is_empty or next_layer.is_empty)]
    alone = dict(zip(busy, parallel_divergence(walker, [[i] for i in busy]), strict=True))
    chosen: list[int] = []
    sets: list[list[int]] = []
    for i in sorted(busy, key=lambda i: alone[i]["kl"]):
        if not {i - 1, i, i + 1} & set(chosen):
            chosen.append(i)
            sets.append(sorted(chosen))
    together = parallel_divergence(walker, sets)
    return {
        "pairs": [{"layers": [i, i + 1], **alone[i]} for i in busy],
        "together": [
            {"pairs": [[i, i + 1] for i in pairs], **found} for pairs, found in zip(sets, together, strict=True)
        ],
    }
