"""A model of any size, layer by layer: whole on the device where it fits, else a layer of it at a time.

What is streamed is read, checked and brought to the device by a thread, one layer ahead of the computation; on a GPU through pinned
memory, on a stream of its own. Residual streams wait on the device as far as a plan has room there, the others in pinned host
memory, and are fetched and put back beside the computation too. Either way the same operations run on the same batches, so that
the results are the same. Letters: B sequences of a batch, T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from puzzle.blocklib.plain.part import Ropes
from puzzle.runtime.model import Block, CausalModel, Weights, embed, load_model, read_block

T = TypeVar("T")
IN_FLIGHT = 2  # batches whose copies may wait for the device: the host must not run ahead of its memory


class Reader:
    """Brings tensors to a device in a thread of its own, while the device computes."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def move(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """From host memory, in another dtype than the model's if need be. In a thread on a GPU: what is returned is there once the work of
        `side` is done."""
        if self.side is None:
            return tensor.to(self.device, dtype or self.dtype)
        return tensor.to(dtype or self.dtype).pin_memory().to(self.device, non_blocking=True)

    def ahead(
        self, reads: Iterable[Callable[[], T]], tensors: Callable[[T], Iterable[Tensor]], count: int = 1
    ) -> Iterator[T]:
        """What `reads` give, in order; the next `count` are read while the caller works with the one in hand. tensors: of a result."""
        waiting: deque[Future[T]] = deque()
        with ThreadPoolExecutor(1) as pool:
            try:
                for read in reads:
                    waiting.append(pool.submit(self._read, read))
                    if len(waiting) > count:
                        yield self._ready(waiting.popleft().result(), tensors)
                while waiting:
                    yield self._ready(waiting.popleft().result(), tensors)
            finally:
                for one in waiting:  # the caller has enough, or one of them failed
                    one.cancel()

    def _read(self, read: Callable[[], T]) -> T:
        if self.side is None:
            return read()
        with torch.cuda.device(self.device), torch.cuda.stream(self.side):
            found = read()
            self.side.synchronize()  # the thread waits, the device does not
            return found

    def _ready(self, found: T, tensors: Callable[[T], Iterable[Tensor]]) -> T:
        """Memory that was taken on one stream may be given away only after the work of the other that reads it."""
        if self.side is not None:
            for tensor in tensors(found):
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return found


class Layered:
    """A model whose layers come one after another: `blocks`. streamed: only the one in hand is on the device, and the next; else
    all of them are, as `model`. forward: nothing but whole sequences go through, so that on a GPU the modules of training serve, whose
    passes over memory are few; what they round differs."""

    def __init__(
        self, source: Weights, device: torch.device, dtype: torch.dtype, *, streamed: bool, forward: bool = False
    ):
        self.source, self.structure, self.device, self.dtype = source, source.structure, device, dtype
        self.in_training = forward and device.type == "cuda"
        self.model = None if streamed else load_model(source, device=device, dtype=dtype, in_training=self.in_training)
        self.reader = Reader(device, dtype)

    def blocks(self, first: int = 0, end: int | None = None, *, backwards: bool = False) -> Iterator[tuple[int, Block]]:
        """(number, layer) of the layers from `first` to before `end`, in order or from the last to the first."""
        order: Iterable[int] = range(first, self.structure.num_layers if end is None else end)
        order = list(reversed(order)) if backwards else list(order)  # type: ignore[call-overload]
        if self.model is not None:
            for index in order:
                yield index, self.model.blocks[index]  # type: ignore[misc]
            return

        def read(index: int) -> Callable[[], tuple[int, Block]]:
            return lambda: (index, read_block(self.source, index, self.reader.move, in_training=self.in_training))

        yield from self.reader.ahead(map(read, order), lambda found: found[1].parameters())

    def parts(
        self, reads: Iterable[Callable[[], T]], tensors: Callable[[T], Iterable[Tensor]], count: int = 1
    ) -> Iterator[T]:
        """What else is read beside the layers, `count` ahead, by `Reader.move`."""
        return self.reader.ahead(reads, tensors, count)

    def ropes(self, length: int) -> Ropes:
        """Tables of sequences of `length` tokens, on the device."""
        return self.structure.rope_tables(length, self.device)

    def embedded(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The stream before the first layer of every batch of ids [B, T]. A streamed embedding stays no longer than this takes."""
        if self.model is not None:
            weight = self.model.embedding.weight
        else:
            weight = self.source.embedding().to(self.device, self.dtype)
        for ids in batches:
            yield embed(ids.to(self.device), weight, self.structure.embedding_scale)

    def last(self) -> CausalModel:
        """Final norm and head, as a model of no layers; streamed ones stay for as long as the caller keeps it."""
        if self.model is not None:
            return self.model
        head, norm = (t.to(self.device, self.dtype) for t in (self.source.lm_head(), self.source.final_norm()))
        # Its one matrix is the head.
        return CausalModel(self.structure, head, [], norm, None).requires_grad_(False).eval()

    def hidden(self, ids: Sequence[Tensor], room: Room) -> Stream:
        """The residual stream after the last layer, of all batches [B, T]."""
        stream, ropes = room.filled(self.embedded(ids)), self.ropes(ids[0].shape[1])
        for _, block in self.blocks():
            room.run([Job(stream, stream, lambda x, block=block: block(x, ropes))])  # type: ignore[misc]
        return stream


@dataclass(eq=False, slots=True)
class Stream:
    """One residual stream of all sequences, batch by batch [B, T, H]."""

    on_host: bool
    batches: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """Every batch of `source`, changed by `through`, becomes that of `target`, which may be the same stream."""

    source: Stream
    target: Stream
    through: Callable[[Tensor], Tensor]


class Room:
    """Where streams wait: the first `on_device` of those that are alive on the device, the others in host memory."""

    def __init__(self, device: torch.device, on_device: int):
        self.device, self.free = device, on_device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[torch.cuda.Event] = deque()

    def stream(self) -> Stream:
        """An empty one."""
        on_host = self.side is not None and self.free <= 0
        self.free -= not on_host
        return Stream(on_host)

    def filled(self, batches: Iterable[Tensor]) -> Stream:
        """One of these batches, on the device as they come."""
        made = self.stream()
        for number, x in enumerate(batches):
            self.put(made, number, x)
        return made

    def copy(self, stream: Stream) -> Stream:
        made = self.stream()
        self.run([Job(stream, made, lambda x: x.clone())])
        return made

    def drop(self, *streams: Stream) -> None:
        for stream in streams:
            self.free += not stream.on_host
            stream.batches = []

    def run(self, jobs: Sequence[Job]) -> None:
        """One after another; a stream that one of them changes is read by later ones as it was changed, but for one that has a
        single batch and is read by the very next."""
        work = [(job, number) for job in jobs for number in range(len(job.source.batches))]
        fetched = self.fetched((job.source, number) for job, number in work)
        for (job, number), x in zip(work, fetched, strict=True):
            self.put(job.target, number, job.through(x))

    def fetched(self, places: Iterable[tuple[Stream, int]]) -> Iterator[Tensor]:
        """The batches of streams, by number, on the device; the next one comes while the caller works with the one in hand."""
        waiting: tuple[Tensor, torch.cuda.Event | None] | None = None
        for stream, number in places:
            upcoming = self._fetch(stream, number)
            if waiting is not None:
                yield self._here(*waiting)
            waiting = upcoming
        if waiting is not None:
            yield self._here(*waiting)

    def _fetch(self, stream: Stream, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
        kept = stream.batches[number]
        if self.side is None or not stream.on_host:
            return kept, None
        with torch.cuda.stream(self.side):
            return kept.to(self.device, non_blocking=True), self.side.record_event()

    def _here(self, x: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            x.record_stream(current)
        return x

    def put(self, stream: Stream, number: int, x: Tensor) -> None:
        """x [B, T, H], on the device, becomes a batch of a stream, or its next one."""
        new = number == len(stream.batches)
        if self.side is None or not stream.on_host:
            stream.batches.append(x) if new else stream.batches.__setitem__(number, x)
            return
        if new:
            stream.batches.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=True))
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            stream.batches[number].copy_(x, non_blocking=True)
            self._leaving.append(self.side.record_event())
        x.record_stream(self.side)
        if len(self._leaving) > IN_FLIGHT:
            self._leaving.popleft().synchronize()


def tensors_of(parts: Mapping[str, torch.nn.Module]) -> Iterator[Tensor]:
    """All weights of modules by name."""
    for part in parts.values():
        yield from part.parameters()
