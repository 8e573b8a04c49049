"""Children of one library over text: those that begin alike run as one until the layer where they part.

A pass carries the residual streams of several children from layer to layer. A child is the path of what stands in for the parent's
sub-blocks, layer by layer; children of the same beginning share its stream, and a pass begins where the one before has left a stream
that all of its children begin with. Replace-one-block scores are children that leave the parent's path in one layer (Puzzle, arXiv
2411.19146, section 4.1), marginal scores those that leave another child's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from puzzle.base.console import Bar
from puzzle.base.device import compute_dtype
from puzzle.blocklib.plain.fp8 import cache_in_fp8, weights_in_fp8
from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.plain.part import Part
from puzzle.blocklib.variant import PARENT
from puzzle.library.assemble import read_part
from puzzle.library.manifest import FP8_CACHE, FP8_WEIGHTS, Library, Replacement
from puzzle.library.store import BlockStore
from puzzle.parents.opened import HfModel
from puzzle.runtime.divergence import Divergence, add_variants
from puzzle.runtime.model import Block
from puzzle.runtime.residency import HEAD_GROUP, Residency
from puzzle.runtime.stream import Job, Layered, Room, Stream, tensors_of

Parts = dict[str, Part]  # by slot
Choice = tuple[tuple[str, str], ...]  # (slot, variant) of what stands in for the parent's in a layer
ChildPath = tuple[Choice, ...]  # layer by layer
# Of a pass: what all that it carries begins with, the paths that it carries, and which of these the next one begins with, if any.
Carried = tuple[ChildPath, Sequence[ChildPath], ChildPath | None]
Measured = list[tuple[ChildPath, dict[str, float]]]


def path_of(layers: Mapping[int, Replacement], num_layers: int) -> ChildPath:
    """layers: {slot: variant} of those that are not the parent's."""
    return tuple(
        tuple((slot, name) for slot, name in layers.get(n, {}).items() if name != PARENT) for n in range(num_layers)
    )


def beginning(paths: Sequence[ChildPath]) -> ChildPath:
    """What all of them begin with."""
    first, last = min(paths), max(paths)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), len(first))]


class Passes:
    """Over held-out sequences [S, T], of children of a library and of its parent."""

    def __init__(self, library: Library, parent: HfModel, sequences: Tensor, device: torch.device, plan: Residency):
        self.library, self.device, self.plan = library, device, plan
        self.store, self.dtype = BlockStore(library.root), compute_dtype(device)
        self.model = Layered(parent, device, self.dtype, streamed=plan.streamed, forward=True)
        self.batches = [ids.long().to(device) for ids in sequences.split(plan.batch_size)]
        self.ropes = self.model.ropes(sequences.shape[1])
        self.room = Room(device, plan.on_device)
        self._cached: dict[tuple[int, str, str], Part] = {}

    @torch.no_grad()
    def run(self, groups: Sequence[Sequence[ChildPath]], bar: Bar) -> Iterator[Measured]:
        """The divergence from the parent of every child, pass by pass. groups: the children of each, all different."""
        whole = path_of({}, self.library.num_layers)
        carried = list(_carried(groups, whole))
        start: Stream | None = None
        final: Stream | None = None  # the parent's last
        own: Iterator[Parts] | None = None
        if self.plan.ahead:  # over the ends of passes too, while the device works
            own = self._parts(carried, self.plan.ahead)
        for paths, (begin, wanted, follows) in zip(groups, carried, strict=True):
            start = start or self.room.filled(self.model.embedded(self.batches))
            streams = self._carry(begin, start, wanted, bar, own)
            final = final or streams[whole]
            yield from self._measured(paths, [streams[path] for path in paths], final, bar)
            start = None if follows is None else streams[follows]
            self.room.drop(*(s for path, s in streams.items() if s is not final and s is not start))

    def _parts(self, carried: Sequence[Carried], count: int) -> Iterator[Parts]:
        """What stands in for the parent's in these passes, in the order of their steps, `count` read ahead."""
        steps = (step for begin, wanted, _ in carried for step in _steps(begin, wanted).items())
        choices = ((layer, choice) for layer, step in steps for choice in step if choice)
        return self.model.parts((partial(self._read, n, dict(choice)) for n, choice in choices), tensors_of, count)

    def _carry(
        self,
        begin: ChildPath,
        start: Stream,
        wanted: Sequence[ChildPath],
        bar: Bar,
        own: Iterator[Parts] | None = None,
    ) -> dict[ChildPath, Stream]:
        """The streams where `wanted` paths end, which may be before the last layer. start: that of `begin`, with which all of them
        begin, used up. own: what stands in for the parent's; None: read here."""
        ends, live, steps = set(wanted), {begin: start}, _steps(begin, wanted)
        own = own or self._parts([(begin, wanted, None)], 1)
        kept = {begin: start} if begin in ends else {}
        for layer, block in self.model.blocks(len(begin), len(begin) + len(steps)):
            bar.note(f"layer {layer}")
            left = Counter(prefix for prefixes in steps[layer].values() for prefix in prefixes)
            left.update([prefix for prefix in left if prefix in kept])
            grown: dict[ChildPath, Stream] = {}
            for choice, prefixes in steps[layer].items():
                replaced = self._replaced(block, dict(choice), next(own)) if choice else block
                jobs = []
                for prefix in prefixes:
                    left[prefix] -= 1
                    target = self.room.stream() if left[prefix] else live[prefix]
                    jobs.append(Job(live[prefix], target, lambda x: replaced(x, self.ropes)))  # noqa: B023 (run before the next)
                    grown[*prefix, choice] = target
                self.room.run(jobs)
            live = grown
            kept |= {path: stream for path, stream in live.items() if path in ends}
        return kept

    def _read(self, layer: int, replacement: Replacement) -> Parts:
        """The trained parts of a replacement."""
        found = {}
        for slot, name in replacement.items():
            if name in (FP8_WEIGHTS, FP8_CACHE):
                continue
            if (layer, slot, name) not in self._cached:
                if len(replacement) == 1 or any(key[0] != layer for key in self._cached):
                    self._cached = {}  # only several slots together take a part again, and only in its layer
                sub_block = self.library.spaces[layer][slot][name]
                part = read_part(
                    self.store, layer, slot, name, sub_block, self.model.reader.move, in_training=self.model.in_training
                )
                self._cached[layer, slot, name] = part
            found[slot] = self._cached[layer, slot, name]
        return found

    def _replaced(self, block: Block, replacement: Replacement, read: Parts) -> Block:
        """The layer with other parts; those in fp8 are made of its own."""
        parts = block.parts() | read
        for slot, name in replacement.items():
            own = parts[slot]
            if name == FP8_WEIGHTS:
                parts[slot] = weights_in_fp8(own)
            elif name == FP8_CACHE:
                assert isinstance(own, Attention)
                parts[slot] = cache_in_fp8(own)
        return Block(parts)

    def _measured(
        self, paths: Sequence[ChildPath], streams: Sequence[Stream], final: Stream, bar: Bar
    ) -> Iterator[Measured]:
        """The divergence of what left the last layer, some children at a time."""
        last = self.model.last()
        for begin in range(0, len(paths), HEAD_GROUP):
            group = streams[begin : begin + HEAD_GROUP]
            meters = [Divergence() for _ in group]
            fetched = self.room.fetched((s, n) for n in range(len(self.batches)) for s in (final, *group))
            for ids in self.batches:
                parent, *hidden = (next(fetched) for _ in range(1 + len(group)))
                add_variants(meters, last, parent, hidden, ids)
            yield [(p, meter.result()) for p, meter in zip(paths[begin : begin + HEAD_GROUP], meters, strict=True)]
            bar.advance(len(group))


def _carried(groups: Sequence[Sequence[ChildPath]], whole: ChildPath) -> Iterator[Carried]:
    """Every pass; the first also carries the parent."""
    begin: ChildPath = ()
    for number, paths in enumerate(groups):
        follows = beginning(groups[number + 1]) if number + 1 < len(groups) else None
        if follows is not None and follows[: len(begin)] != begin:
            follows = None
        yield begin, [*paths, *([] if follows is None else [follows]), *([] if number else [whole])], follows
        begin = follows or ()


def _steps(begin: ChildPath, wanted: Sequence[ChildPath]) -> dict[int, dict[Choice, list[ChildPath]]]:
    """By layer, behind what all of them begin with: by what stands in it, the parent's last, the beginnings that it follows."""
    steps: dict[int, dict[Choice, list[ChildPath]]] = {}
    for layer in range(len(begin), max(map(len, wanted))):
        found: dict[Choice, list[ChildPath]] = {}
        for path in dict.fromkeys(path[: layer + 1] for path in wanted if len(path) > layer):
            found.setdefault(path[layer], []).append(path[:layer])
        own = found.pop((), None)
        steps[layer] = found if own is None else found | {(): own}
    return steps
