"""Memory that a healing takes besides its models, by formula.

Letters: P trained parameters, R tokens of a rank's micro-batch, H hidden_size, F the widest FFN, V vocab_size.
"""

from __future__ import annotations

from puzzle.base.ranks import Ranks
from puzzle.data.mixture import Stage
from puzzle.heal.loss import Learner
from puzzle.heal.settings import HealOptions

STATE_BYTES = 12  # per trained parameter: gradient and two moments in float32
MOST_LOGITS = 2**24


def training_bytes(
    learner: Learner, options: HealOptions, stages: list[Stage], ranks: Ranks, sharded: bool = False
) -> int:
    """Of a process: STATE_BYTES · P (over the ranks, where the child is sharded) + R · (layers · saved + 6 · V).

    saved per token and layer: 8 H + 4 F elements of a block's activations (2 H when they are recomputed), and H of the
    teacher's state.
    """
    child, size = learner.child, learner.dtype.itemsize
    trained = sum(p.numel() for p in child.parameters() if p.requires_grad)
    hidden = child.structure.hidden_size
    sides = [side for *_, part in child.parts() for p in part.parameters() if p.ndim > 1 for side in p.shape]
    rows = max(s.batch_size * s.seq_len for s in stages) // options.accumulate // ranks.world
    saved = 2 * hidden if options.recompute else 8 * hidden + 4 * max(sides, default=0)
    logits = 6 * min(rows * len(child.head_weight), MOST_LOGITS) * 4
    return (
        STATE_BYTES * trained // (ranks.world if sharded else 1)
        + rows * len(child.blocks) * (saved + hidden) * size
        + logits
    )
