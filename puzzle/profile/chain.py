"""What is timed when one sub-block is profiled on a GPU: a chain of copies with weights and caches of their own.

Copies follow each other as a model's layers do: the stream of one is the input of the next, and by the time a copy's turn
comes again its weights have left the cache (the L2 of an H100 holds 50 MB).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from puzzle.blocklib.fast import Batch, Fast, FastAttention, Stream, make_fast


def fast_copies(modules: Sequence[nn.Module], batch: Batch) -> list[Fast]:
    """The modules ready to run in `batch`; caches that come from no pool hold noise."""
    found = [part for module in modules if (part := make_fast(module, batch)) is not None]
    for part in found:
        if isinstance(part, FastAttention) and batch.pool is None:
            part.randomize()
    return found


def chain(parts: Sequence[Fast], batch: Batch, phase: str, delta: Tensor, residual: Tensor) -> Callable[[], Stream]:
    """One pass through all parts."""

    def run() -> Stream:
        stream: Stream = (delta, residual)
        for part in parts:
            stream = part.prefill(stream, batch) if phase == "prefill" else part.decode(stream, batch)
        return stream

    return run
