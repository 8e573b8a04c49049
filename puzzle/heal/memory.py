"""What a healing holds in memory, and so how it runs: a formula, before anything is loaded.

Of several processes each trains a replica of the child where one fits, else a shard. A teacher is whole where it fits, on every
replica's device or in shards as the child, else every process streams it, for its own sequences.
Letters: P trained parameters, Q the teacher's, R tokens of a micro-batch, H hidden_size, F the widest FFN.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from puzzle.base.device import PLANNED
from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks
from puzzle.base.units import bytes_text
from puzzle.blocklib.sub_block import Normed
from puzzle.data.mixture import Stage
from puzzle.heal.prepare import Models
from puzzle.heal.settings import HealOptions
from puzzle.parents.structure import Layer, Structure
from puzzle.runtime.open import DTYPES, pick_precision
from puzzle.runtime.residency import (
    LAYERS_THERE,
    LOGITS_BYTES,
    MOST_LOGITS,
    STAGED,
    Memory,
    layer_parameters,
    widest,
)

MASTER_BYTES = 16  # per trained parameter: float32 weight, gradient and two moments
RESERVED = 1.25  # of what is alive: torch's allocator cuts segments, and leaves some of them empty
LIBRARIES = 3 * 2**25  # cuBLAS: a workspace for every thread and stream
MOST_TOKENS = 2**20  # looked at ahead: a pass over a streamed teacher is long enough by then to hide its reading


@dataclass(frozen=True, kw_only=True, slots=True)
class HealPlan:
    """sharded: the child, and a teacher that is whole, are split over the processes. tokens: that a streamed teacher looks at in one
    pass, whose hidden states wait; None: it is whole. Bytes are the peak that is planned, of a process."""

    sharded: bool
    tokens: int | None
    device_bytes: int
    host_bytes: int

    def taught(self, tokens_per_step: int) -> str:
        """How the teacher is there, in one line. tokens_per_step: of a process."""
        where = f"device memory {bytes_text(self.device_bytes)}, host memory {bytes_text(self.host_bytes)}"
        if self.tokens is None:
            return f"{'in shards' if self.sharded else 'whole on the device'} ({where})"
        return f"layer by layer, once in {max(1, self.tokens // tokens_per_step)} steps ({where})"


def plan_memory(options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks) -> HealPlan:
    """How it fits. Raises UserError where it does not, or not in a way that the options work with."""
    plan = _planned(options, stages, models, ranks)
    for name in ("align_tokens", "on_policy"):
        if getattr(options, name) and plan.tokens is not None:
            raise UserError(
                f"`{name}` asks a teacher that is whole in memory, and this one would be read layer by layer: use a smaller teacher, more "
                "processes or a larger `memory_limit`"
            )
    if options.on_policy and plan.sharded:
        raise UserError(
            "`on_policy` samples from a child that is whole in every process: pass `parallel` replicas, or leave it out"
        )
    return plan


def _planned(options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks) -> HealPlan:
    """The first that fits: a replica with a whole teacher, shards of both, a replica with a streamed teacher, shards with one; of what
    `parallel` leaves, and the last if none does. A teacher on a device of its own is whole. Raises UserError where not even a
    micro-batch's hidden states can wait."""
    memory = Memory.of(ranks.device, options.memory_limit, ranks)
    ways = {"replicas": [False], "shards": [True]}.get(options.parallel, [False, True]) if ranks.world > 1 else [False]
    always_whole = models.teacher is None or models.teacher_device != ranks.device
    for sharded in ways:
        used = heal_bytes(options, stages, models, ranks, streamed=False, sharded=sharded)
        if used <= memory.device or (always_whole and sharded == ways[-1]):
            return HealPlan(sharded=sharded, tokens=None, device_bytes=memory.held + used, host_bytes=0)
    assert models.teacher is not None
    structure, size, least = models.teacher.structure, models.dtype.itemsize, micro_batch(options, stages, ranks)
    # Pinned: powers of two.
    each = (len(models.pairs) + 3) * structure.hidden_size * size * (1 if memory.on_host else 2)
    for sharded in ways:
        used = heal_bytes(options, stages, models, ranks, streamed=True, sharded=sharded)
        if used + (least * each if memory.on_host else 0) <= memory.device:
            break
    staged = 0 if memory.on_host else STAGED * _largest(structure) * size
    room = memory.device - used if memory.on_host else memory.host - staged
    if room < least * each:
        needed = least * each + (used if memory.on_host else staged)
        there = "memory" if memory.on_host else "host memory"
        raise UserError(
            f"a teacher that is read layer by layer needs {bytes_text(int(memory.held + needed / PLANNED))} of {there} for the hidden "
            f"states of {least} tokens: use a larger `accumulate`, a smaller `batch_size` or `seq_len`, or a larger `memory_limit`"
        )
    tokens = min(MOST_TOKENS, room // each, sum(stage.num_tokens for stage in stages) // ranks.world)
    waiting = max(least, tokens) * each
    on_device = waiting if memory.on_host else 0
    return HealPlan(
        sharded=sharded,
        tokens=tokens,
        device_bytes=memory.held + used + on_device,
        host_bytes=0 if memory.on_host else staged + waiting,
    )


def micro_batch(options: HealOptions, stages: list[Stage], ranks: Ranks) -> int:
    """Tokens that go through a model at once, at most."""
    return max(s.batch_size * s.seq_len for s in stages) // options.accumulate // ranks.world


def heal_bytes(
    options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks, *, streamed: bool, sharded: bool
) -> int:
    """MASTER_BYTES · P + bytes of layers that stay + bytes of Q, or of the ends and three layers of a streamed teacher, + `working_bytes`, and
    what sampling takes; of what is sharded this rank's part, but at first all of it, as it is read. Ends that do not learn are whole."""
    child, size = models.child.structure, models.dtype.itemsize
    blocks = child.num_parameters - (0 if options.train_embeddings else _ends(child))
    trained = blocks if options.old_lr > 0 else sum(prod(models.child.shapes()[name]) for name in models.new or ())
    split, taught, read = ranks.world if sharded else 1, 0, 4 * child.num_parameters
    frozen = (blocks - trained) * (4 if sharded else size) // split
    frozen += 0 if options.train_embeddings else _ends(child) * size  # the teacher's own, where those are the same
    if models.teacher is not None:
        structure = models.teacher.structure
        inside = LAYERS_THERE * _largest(structure) if streamed else structure.num_parameters - _ends(structure)
        taught = _ends(structure) + (inside if streamed else inside // split)
        read += (_ends(structure) + inside) * size
    steps, held_out = working_bytes(options, stages, models, ranks)
    sampling = sampling_bytes(options, stages, models, ranks)
    if ranks.device.type == "cuda":  # a CUDA graph keeps what it works with
        working = int(RESERVED * (steps + held_out)) + LIBRARIES + sampling
    else:
        working = max(steps, held_out, sampling)
    return max(read, MASTER_BYTES * trained // split + frozen + taught * size + working)


def working_bytes(options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks) -> tuple[int, int]:
    """Of the tensors alive at the peak of a step, and of an evaluation: streams + the most of (head, layer in hand).

    streams, a token: H for each layer of the child and its embedding; for each pair H of the teacher's; 8 H of final norms and gradients.
    layers that are kept, all or with `recompute` one (`saved_bytes`), a token: of every sub-block `saved` and of each norm 4 H (its input
    in float32, its output before and after the scale; 5 H with an offset, 3 H where all is float32); beside, their weights in bf16.
    layer in hand: that, with `recompute`, and the most of 8 H and twice the widest, which are gradients; and of its weights'.
    head: `_head_bytes`. No kernel keeps scores [T, T] or logits [R, V], so that all is linear in R. tests/heal/test_memory.py counts.
    """
    child, size, rows = models.child.structure, models.dtype.itemsize, micro_batch(options, stages, ranks)
    hidden, context = child.hidden_size, max(stage.seq_len for stage in stages)
    wide = 4 if size == 4 else 6  # of a weight's gradient, and before it is summed up

    def passing(structure: Structure) -> int:
        """Of a layer without what the backward pass needs."""
        return rows * (8 * structure.hidden_size + 3 * max(map(widest, structure.layers))) * size

    layers = [saved_bytes(layer, rows, context, size) for layer in child.layers]
    gradients = rows * max(8 * hidden, 2 * max(map(widest, child.layers))) * size + wide * _largest(child)
    in_hand = gradients + (max(layers) if options.recompute else 0)
    shown, held_out = rows * 8 * hidden * size, passing(child)
    if models.teacher is not None:
        taught = models.teacher.structure
        pairs = len(models.pairs) if options.cosine_weight > 0 else 0
        shown += rows * (pairs + 1) * taught.hidden_size * size
        held_out = max(held_out, passing(taught))
    head = _head_bytes(options, models, rows, ranks)
    streams = rows * (child.num_layers + 1) * hidden * size + (0 if options.recompute else sum(layers))
    return shown + max(streams + max(head, in_hand), held_out), shown + max(head, held_out)


def saved_bytes(layer: Layer, rows: int, context: int, size: int) -> int:
    """What a layer's forward pass keeps of `rows` tokens, of sequences of `context`, in elements of `size` bytes."""
    norms = 0
    for block in layer.values():
        if isinstance(block, Normed):
            each = (3 if size == 4 else 4 + block.norm_offset) * block.hidden_size + 2  # and 1 / rms in float32
            norms += each * (1 + (block.norm == "both"))
    per_token = norms + sum(block.saved(context) for block in layer.values())
    return (rows * per_token + (layer_parameters(layer) if size < 4 else 0)) * size


def _head_bytes(options: HealOptions, models: Models, rows: int, ranks: Ranks) -> int:
    """LOGITS_BYTES a logit of a chunk in plain PyTorch, and the heads in float32; the kernels have two logits and a gradient of at most
    10 bytes, hidden states of a chunk with their gradients, and 40 bytes of sums a token."""
    child, size = models.child.structure, models.dtype.itemsize
    logits, ends = min(rows * child.vocab_size, MOST_LOGITS), 2 * child.vocab_size * child.hidden_size
    plain = (
        options.train_embeddings or options.reverse_kl > 0 or options.align_tokens or options.teacher_logits is not None
    )
    if ranks.device.type != "cuda" or plain:
        return logits * LOGITS_BYTES + (ends * 4 if size < 4 or options.train_embeddings else 0)
    return 10 * logits + rows * (2 * child.hidden_size * (size + 4) + 40)


def sampling_bytes(options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks) -> int:
    """Caches and random numbers of a micro-batch, logits, and on a GPU the child in bf16; 0 where the child writes nothing."""
    if not options.on_policy:
        return 0
    child, precision = models.child.structure, pick_precision(ranks.device)
    copy = child.num_parameters * DTYPES[precision].itemsize if ranks.device.type == "cuda" else 0

    def of(stage: Stage) -> int:
        cache = sum(block.state().num_bytes(stage.seq_len, precision, 64) for _, _, block in child)
        return stage.batch_size // options.accumulate // ranks.world * (cache + 16 * child.vocab_size)

    return copy + max(map(of, stages))


def _ends(structure: Structure) -> int:
    """Parameters of embedding and head."""
    return structure.num_fixed_parameters - structure.hidden_size  # the final norm is trained


def _largest(structure: Structure) -> int:
    return max(map(layer_parameters, structure.layers))
