"""Whether models are whole on the device or streamed, and how many residual streams go along in a pass: planned before anything runs.

Letters: S sequences of T tokens, B of them in a batch, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from puzzle.base.device import PLANNED, compute_dtype, held_memory
from puzzle.base.errors import UserError
from puzzle.base.machine import available_memory
from puzzle.base.ranks import Ranks
from puzzle.base.units import bytes_text
from puzzle.parents.structure import Layer, Structure

LOGITS_BYTES = 28  # float32 ones of both models, and five more alive at once (kernels/linear_kl.py)
MOST_LOGITS = 2**24 + 2**20
LAYERS_THERE = 3  # of a streamed model on the device: in hand, the next one, and one whose memory is not free yet
STAGED = 4  # layers' worth of pinned memory, whose blocks have sizes of powers of two
FULL = 2**25  # numbers of a residual stream in a batch, from which on a GPU's kernels take longer than their launch
HEAD_GROUP = 8  # variants whose divergence is taken together


def widest(layer: Layer) -> int:
    """The longest side of a matrix in the layer, or what counts as one."""
    return max((sub_block.widest for sub_block in layer.values()), default=0)


def workspace_bytes(layer: Layer, hidden: int, tokens: int, compute_bytes: int) -> int:
    """Activations of one variant in flight: the residual streams and targets, and the widest module's saved tensors."""
    streams = 5 * hidden * compute_bytes + 4 * hidden * 4
    return tokens * ((4 * widest(layer) + 6 * hidden) * compute_bytes + streams)


def layer_parameters(layer: Layer) -> int:
    """Of one layer, norms included."""
    return sum(sub_block.num_parameters for sub_block in layer.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes that a plan may fill, on the device and, for a GPU, beside it in host memory; held: of the device before (`held_memory`)."""

    device: int
    host: int
    held: int = 0
    on_host: bool = False  # the device is the CPU, whose memory is all there is

    @classmethod
    def of(cls, device: torch.device, limit: int | None, ranks: Ranks | None = None) -> Memory:
        """Free now. ranks: processes that make the same plan, by the least that one of them has; those of a host share it."""
        ranks, on_host = ranks or Ranks(device=device), device.type == "cpu"
        host = 0 if on_host else min(ranks.gather(int(PLANNED * available_memory()) // ranks.here))
        return cls(device=ranks.memory(limit), host=host, held=held_memory(device), on_host=on_host)


@dataclass(frozen=True, kw_only=True, slots=True)
class Residency:
    """streamed: a layer at a time, else whole on the device. batch_size: sequences at once. together: variants that one pass carries;
    on_device: streams, the parent's among them, that wait there. Bytes are the peak that is planned. ahead: variants that are read while
    others are computed, from one pass to the next; 0: the next one alone, of the same pass."""

    streamed: bool
    batch_size: int
    together: int
    on_device: int
    device_bytes: int
    host_bytes: int
    ahead: int = 0

    def told(self, wanted: int = 0) -> str:
        """In one line. wanted: variants in all."""
        where = f"device memory {bytes_text(self.device_bytes)}, host memory {bytes_text(self.host_bytes)}"
        passes = f", {-(-wanted // self.together)} passes of up to {self.together} variants" if wanted else ""
        if not self.streamed:
            return f"whole on the device ({where})"
        return f"layer by layer{passes} ({where})"

    def to_json(self, wanted: int = 0) -> dict[str, Any]:
        found = asdict(self)
        del found["ahead"]
        if not wanted:
            del found["together"]
        return found | ({"passes": -(-wanted // self.together)} if wanted else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Passing:
    """What passes over text. models: that are needed at once; spare: streams beside those of `wanted` variants; at_once: variants
    of one pass while all is whole, where nothing is gained by more; beside: parameters that are on the device with a layer; ahead:
    those of `at_once` variants more, which a GPU takes early if it has the room."""

    models: Sequence[Structure]
    sequences: int
    seq_len: int
    compute_bytes: int
    spare: int
    wanted: int = 0
    at_once: int = 0
    beside: int = 0
    ahead: int = 0

    @property
    def hidden(self) -> int:
        return self.models[0].hidden_size

    def stream_bytes(self, batch: int | None = None) -> int:
        """batch: None on the device; else in pinned memory, in batches of so many."""
        each = self.seq_len * self.hidden * self.compute_bytes
        if batch is None:
            return self.sequences * each
        return -(-self.sequences // batch) * 2 ** (min(batch, self.sequences) * each - 1).bit_length()

    def batch(self, asked: int, memory: Memory) -> int:
        """Sequences at a time: `asked`, or on a GPU as many as fill it where a model is narrow, in equal parts."""
        if memory.on_host:
            return asked
        most = min(self.sequences, max(asked, FULL // (self.seq_len * self.hidden)))
        return -(-self.sequences // -(-self.sequences // most)) if most > asked else asked

    def working(self, batch: int) -> int:
        layers = [layer for model in self.models for layer in model.layers]
        return max(workspace_bytes(layer, self.hidden, batch * self.seq_len, self.compute_bytes) for layer in layers)

    def logits(self, batch: int) -> int:
        return LOGITS_BYTES * min(batch * self.seq_len * max(m.vocab_size for m in self.models), MOST_LOGITS)

    def resident(self, batch: int) -> int:
        """Bytes with every model whole, and room for one variant."""
        weights = (sum(model.num_parameters for model in self.models) + self.beside) * self.compute_bytes
        return weights + self.waiting() * self.stream_bytes() + self.working(batch) + self.logits(batch)

    @property
    def largest_layer(self) -> int:
        """Bytes."""
        return self.compute_bytes * max(layer_parameters(layer) for model in self.models for layer in model.layers)

    def streamed(self, batch: int) -> int:
        """Bytes with a layer at a time, or the ends; without streams that wait."""
        matrix = max(m.vocab_size for m in self.models) * self.hidden * self.compute_bytes
        group = min(HEAD_GROUP, self.wanted) * 2 * batch * self.seq_len * self.hidden * self.compute_bytes
        ends = len(self.models) * matrix + self.logits(batch) + group
        return max(ends, LAYERS_THERE * self.largest_layer + self.beside * self.compute_bytes) + self.working(batch)

    def waiting(self) -> int:
        """Streams that must be there at least."""
        return self.spare + min(1, self.wanted)

    def least(self, on_host: bool) -> int:
        """Bytes of the device without which nothing goes through, a sequence at a time."""
        return min(self.resident(1), self.streamed(1) + (self.waiting() * self.stream_bytes() if on_host else 0))


def plan_residency(what: str, passing: Passing, memory: Memory, batch_size: int) -> Residency:
    """Whole where it fits with at least a sequence at a time, else streamed, with as many variants a pass as can wait.

    what: is planned, for messages. Raises UserError where not even one variant can go through.
    """
    sizes = range(min(batch_size, passing.sequences), 0, -1)
    each, needed = passing.stream_bytes(), passing.spare + passing.wanted
    for size in sizes:
        used = passing.resident(size)
        if used <= memory.device:
            more = max(0, min(passing.at_once - 1, (memory.device - used) // each))
            taken, together = used + more * each, more + min(1, passing.wanted)
            streams = passing.spare + together
            early = passing.ahead * passing.compute_bytes
            ahead = together if 0 < early <= memory.device - taken and not memory.on_host else 0
            taken += early if ahead else 0
            return Residency(
                streamed=False,
                batch_size=size,
                together=together,
                on_device=streams,
                device_bytes=memory.held + taken,
                host_bytes=0,
                ahead=ahead,
            )
    least = passing.waiting()
    for size in sizes:
        left, staged = memory.device - passing.streamed(size), 0 if memory.on_host else STAGED * passing.largest_layer
        if left < 0:
            continue
        on_device = min(needed, left // each)
        waiting = 0 if memory.on_host else max(0, memory.host - staged) // passing.stream_bytes(size)
        streams = min(needed, on_device + waiting)
        if streams >= least and memory.host >= staged:
            on_host = streams - on_device
            return Residency(
                streamed=True,
                batch_size=size,
                together=streams - passing.spare,
                on_device=on_device,
                device_bytes=memory.held + passing.streamed(size) + on_device * each,
                host_bytes=staged + on_host * passing.stream_bytes(size),
            )
    own = passing.least(memory.on_host)
    told = f"{what} {passing.sequences} sequences of {passing.seq_len} tokens"
    if memory.on_host or own > memory.device:
        raise UserError(
            f"{told} needs {bytes_text(int(memory.held + own / PLANNED))} in all: use fewer `sequences`, a smaller "
            "`seq_len` or a larger `memory_limit`"
        )
    host = STAGED * passing.largest_layer + least * passing.stream_bytes(1)
    raise UserError(
        f"{told} needs {bytes_text(int(host / PLANNED))} of host memory, where {bytes_text(int(memory.host / PLANNED))} are free: use "
        "fewer `sequences` or a smaller `seq_len`"
    )


def bytes_of(device: torch.device) -> int:
    """Of a number that this device computes with."""
    return compute_dtype(device).itemsize
