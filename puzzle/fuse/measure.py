"""What layers owe to earlier layers, measured on held-out text: the dependency matrix, and blocks run in parallel.

A pass over the child, layer by layer: beside the child's own residual stream go those in which one earlier layer added nothing, as many
as memory has room for. Letters: B sequences, T tokens, E hidden_size, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzle.base.console import Bar, progress
from puzzle.blocklib.none import NoOp
from puzzle.export.walker import Walker
from puzzle.fuse.matrix import Matrix, Rows
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.stream import Stream

T = TypeVar("T")


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

    Streams that wait: one for every layer that is left out, twice that with `ffns`, or as many at a time as the walker takes.
    """
    count, room = len(walker.child.layers), walker.room
    layers, alone = _Sums(count), _Sums(count)
    left_out = [(j, layers) for j, layer in enumerate(walker.child.layers) if not layer.is_empty]
    left_out += [(j, alone) for j, layer in enumerate(walker.child.layers) if ffns and not isinstance(layer.ffn, NoOp)]
    left_out.sort(key=lambda one: one[0])
    passes = list(_portions(left_out, walker.together))
    with progress("dependency", count * len(passes)) as bar:
        for portion in passes:
            own = walker.embedded()
            without: list[tuple[int, _Sums, Stream]] = []  # the layer left out, what is measured so, its stream
            for j, block in walker.blocks():
                bar.note(f"layer {j}")
                joining = [(j, sums, room.stream()) for i, sums in portion if i == j]
                streams = [own, *(stream for _, _, stream in without)]
                fetched = room.fetched((stream, n) for n in range(len(walker.ids)) for stream in streams)
                for batch in range(len(walker.ids)):
                    x = next(fetched)
                    attention, ffn = walker.added(block, x)
                    for i, sums, stream in without:
                        other = next(fetched)
                        own_attention, own_ffn = walker.added(block, other)
                        if sums is layers:
                            sums.add(i, j, attention + ffn, own_attention + own_ffn)
                        else:
                            sums.add(i, j, ffn, own_ffn)
                        room.put(stream, batch, other + own_attention + own_ffn)
                    for _, sums, stream in joining:
                        room.put(stream, batch, x if sums is layers else x + attention)
                    room.put(own, batch, x + attention + ffn)
                without += joining
                bar.advance()
            room.drop(own, *(stream for _, _, stream in without))
    num_tokens = sum(ids.numel() for ids in walker.ids)
    return layers.matrix(num_tokens), alone.matrix(num_tokens) if ffns else None


def _portions(items: list[T], size: int | None) -> Iterator[list[T]]:
    """Lists of `size` items at most; None: all together."""
    step = max(1, size or len(items))
    yield from (items[at : at + step] for at in range(0, len(items), step))


@torch.no_grad()
def parallel_divergence(walker: Walker, sets: list[list[int]]) -> list[dict[str, float]]:
    """For each set of layers i: the child's KL(child‖changed) when each i and i + 1 read the same input.

    A pair computes x + c_i(x) + c_{i+1}(x), with c what a whole block adds (arXiv 2503.18908, "parallelizing whole
    blocks"); sets hold disjoint pairs. Returns {"kl", "kl_stderr"} of each set, in nats per token.
    """
    passes = list(_portions(sets, None if walker.together is None else walker.together // 2))
    found: list[dict[str, float]] = []
    with progress("in parallel", len(walker.child.layers) * len(passes)) as bar:
        for portion in passes:
            found += _in_parallel(walker, portion, bar)
    return found


def _in_parallel(walker: Walker, sets: list[list[int]], bar: Bar) -> Iterator[dict[str, float]]:
    """The same in one pass, with two streams of a set at most."""
    room, batches = walker.room, range(len(walker.ids))
    own = walker.embedded()
    changed: dict[int, Stream] = {}
    before: dict[int, Stream] = {}  # per set, the input that a pair in hand shares
    for j, block in walker.blocks():
        for number, pairs in enumerate(sets):
            stream, shared = changed.get(number), before.pop(number, None)
            if j in pairs:
                before[number] = room.copy(stream or own)
            if stream is None and shared is None:
                continue  # the same as the child so far
            stream = changed.setdefault(number, stream or room.copy(own))
            reads = [stream] if shared is None else [stream, shared]
            fetched = room.fetched((one, n) for n in batches for one in reads)
            for batch in batches:
                x, *read = (next(fetched) for _ in reads)
                room.put(stream, batch, x + sum(walker.added(block, read[0] if read else x)))
            if shared is not None:
                room.drop(shared)
        for batch, x in enumerate(room.fetched((own, n) for n in batches)):
            room.put(own, batch, x + sum(walker.added(block, x)))
        bar.advance()
    last = walker.model.last()
    for number in range(len(sets)):
        meter, other = Divergence(), changed.get(number, own)
        fetched = room.fetched((one, n) for n in batches for one in (own, other))
        for ids in walker.ids:
            meter.add(last, next(fetched), last, next(fetched), ids)
        result = meter.result()
        yield {key: result[key] for key in ("kl", "kl_stderr")}
    room.drop(own, *changed.values())


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
