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
from puzzle.data.mixture import Stage
from puzzle.heal.prepare import Models
from puzzle.heal.settings import HealOptions
from puzzle.parents.structure import Structure
from puzzle.runtime.open import DTYPES, pick_precision
from puzzle.runtime.residency import LAYERS_THERE, STAGED, Memory, layer_parameters, widest

MASTER_BYTES = 16  # per trained parameter: float32 weight, gradient and two moments
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
    """MASTER_BYTES · P + bytes of layers that stay + bytes of Q, or of the ends and three layers of a streamed teacher, + R · (layers ·
    saved + 3 · V) · bytes of an element, and what sampling takes; of what is sharded this rank's part, but at first all of it, as it is
    read. Ends that do not learn are whole.

    saved per token and layer: 8 H + 4 F of a block's activations (2 H when they are recomputed, and those of the block in hand), H of the
    teacher's state. No kernel keeps scores [T, T] or logits [R, V], so that this is linear in the length of a sequence.
    """
    child, size = models.child.structure, models.dtype.itemsize
    blocks = child.num_parameters - (0 if options.train_embeddings else _ends(child))
    trained = blocks if options.old_lr > 0 else sum(prod(models.child.shapes()[name]) for name in models.new or ())
    split, taught, read = ranks.world if sharded else 1, 0, 4 * child.num_parameters
    frozen = (blocks - trained) * (4 if sharded else size) // split
    if models.teacher is not None:
        structure = models.teacher.structure
        inside = LAYERS_THERE * _largest(structure) if streamed else structure.num_parameters - _ends(structure)
        taught = _ends(structure) + (inside if streamed else inside // split)
        read += (_ends(structure) + inside) * size
    hidden, rows = child.hidden_size, micro_batch(options, stages, ranks)
    block = 8 * hidden + 4 * max(map(widest, child.layers))
    kept, again = (2 * hidden, block) if options.recompute else (block, 0)
    per_token = (child.num_layers * (kept + hidden) + again) * size
    logits = 6 * min(rows * child.vocab_size, 2**24) * 4
    working, sampling = rows * per_token + logits, sampling_bytes(options, stages, models, ranks)
    together = ranks.device.type == "cuda"  # a CUDA graph keeps what it works with
    working = working + sampling if together else max(working, sampling)
    return max(read, MASTER_BYTES * trained // split + frozen + taught * size + working)


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
