"""What a healing holds in memory, and whether its teacher is whole on the device or streamed: a formula, before anything is loaded.

Letters: P trained parameters, Q the teacher's, R tokens of a micro-batch, H hidden_size, F the widest FFN.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle.base.device import PLANNED
from puzzle.base.errors import UserError
from puzzle.base.units import bytes_text
from puzzle.data.mixture import Stage
from puzzle.heal.parallel import Ranks
from puzzle.heal.prepare import Models
from puzzle.heal.settings import HealOptions
from puzzle.parents.structure import Structure
from puzzle.runtime.residency import LAYERS_THERE, STAGED, Memory, layer_parameters, widest

MASTER_BYTES = 16  # per trained parameter: float32 weight, gradient and two moments
MOST_TOKENS = 2**20  # looked at ahead: a pass over a streamed teacher is long enough by then to hide its reading


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPlan:
    """tokens: that a streamed teacher looks at in one pass, whose hidden states wait; None: it is whole on the device. Bytes are the
    peak that is planned."""

    tokens: int | None
    device_bytes: int
    host_bytes: int

    def told(self, tokens_per_step: int) -> str:
        """In one line."""
        where = f"device memory {bytes_text(self.device_bytes)}, host memory {bytes_text(self.host_bytes)}"
        if self.tokens is None:
            return f"whole on the device ({where})"
        return f"layer by layer, once in {max(1, self.tokens // tokens_per_step)} steps ({where})"


def plan_teacher(options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks) -> TeacherPlan:
    """Whole where it fits beside the child in training, else streamed; over several processes, and on a device of its own, it is
    whole. Raises UserError where not even a micro-batch's hidden states can wait."""
    used = heal_bytes(options, stages, models, ranks, streamed=False)
    memory = Memory.of(ranks.device, options.memory_limit)
    whole = models.teacher is None or ranks.world > 1 or models.teacher_device != ranks.device
    if whole or used <= memory.device:
        return TeacherPlan(tokens=None, device_bytes=memory.held + used, host_bytes=0)
    assert models.teacher is not None
    structure, size = models.teacher.structure, models.dtype.itemsize
    used = heal_bytes(options, stages, models, ranks, streamed=True)
    staged = 0 if memory.on_host else STAGED * _largest(structure) * size
    room = memory.device - used if memory.on_host else memory.host - staged
    each = (
        (len(models.pairs) + 3) * structure.hidden_size * size * (1 if memory.on_host else 2)
    )  # pinned: powers of two
    least = micro_batch(options, stages, ranks)
    if room < least * each:
        needed = least * each + (used if memory.on_host else staged)
        there = "memory" if memory.on_host else "host memory"
        raise UserError(
            f"a teacher that is read layer by layer needs {bytes_text(int(memory.held + needed / PLANNED))} of {there} for the hidden "
            f"states of {least} tokens: use a larger `accumulate`, a smaller `batch_size` or `seq_len`, or a larger `memory_limit`"
        )
    tokens = min(MOST_TOKENS, room // each, sum(stage.num_tokens for stage in stages))
    waiting = max(least, tokens) * each
    on_device = waiting if memory.on_host else 0
    return TeacherPlan(
        tokens=tokens,
        device_bytes=memory.held + used + on_device,
        host_bytes=0 if memory.on_host else staged + waiting,
    )


def micro_batch(options: HealOptions, stages: list[Stage], ranks: Ranks) -> int:
    """Tokens that go through a model at once, at most."""
    return max(s.batch_size * s.seq_len for s in stages) // options.accumulate // ranks.world


def heal_bytes(options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks, *, streamed: bool) -> int:
    """MASTER_BYTES · P + bytes of Q, or of the ends and three layers of a streamed teacher, + R · (layers · saved + 3 · V) · bytes of
    an element; P and Q of this rank.

    saved per token and layer: 8 H + 4 F of a block's activations (2 H when they are recomputed), H of the teacher's state.
    """
    child, size = models.child.structure, models.dtype.itemsize
    trained = child.num_parameters - (0 if options.train_embeddings else _ends(child))
    taught = 0
    if models.teacher is not None:
        structure = models.teacher.structure
        parts = LAYERS_THERE * _largest(structure) if streamed else structure.num_parameters - _ends(structure)
        taught = _ends(structure) + parts
    hidden, rows = child.hidden_size, micro_batch(options, stages, ranks)
    saved = 2 * hidden if options.recompute else 8 * hidden + 4 * max(map(widest, child.layers))
    per_token = child.num_layers * (saved + hidden) * size
    logits = 6 * min(rows * child.vocab_size, 2**24) * 4
    return (MASTER_BYTES * trained + taught * size) // ranks.world + rows * per_token + logits


def _ends(structure: Structure) -> int:
    """Parameters of embedding and head."""
    return structure.vocab_size * structure.hidden_size * (1 if structure.tied else 2)


def _largest(structure: Structure) -> int:
    return max(map(layer_parameters, structure.layers))
