"""What vLLM allocates for one sequence, beside what its layers keep: pages of one size for all of them.

The pool has pages of as many tokens of the layer with the most KV heads as hold the largest state of Mamba-2; a page of any other layer is
as large, with more tokens in it or, of Mamba-2, with a state and nothing. Layers that are alike fall into groups of as many layers, the last
of which may lack some; a sequence takes a page of every layer of a group at a time. Read from vLLM 0.26 and 0.32 (platforms/interface.py,
v1/core/kv_cache_utils.py), without prefix caching and speculation. Needs no vLLM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from puzzle.base.units import PRECISION_BYTES
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.recurrent import Recurrent
from puzzle.blocklib.sub_block import SubBlock

STEPS = {"cpu": 128, "gpu": 16}  # tokens of a page that vLLM starts from


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of one sequence of `num_tokens`: what its layers keep, in ours and as the engine's own specs say; the pages that the engine
    allocates for them, as we compute it and as it does."""

    num_tokens: int
    ours: int
    theirs: int
    pages: int
    their_pages: int

    @property
    def equal(self) -> bool:
        return self.ours == self.theirs and self.pages == self.their_pages

    @property
    def verdict(self) -> str:
        ours = f"{self.theirs:,} bytes of {self.num_tokens:,} tokens in {self.their_pages:,} of pages"
        return ours if self.equal else f"{ours} (WE SAY {self.ours:,} in {self.pages:,})"


def kept(sub_blocks: Iterable[SubBlock], precision: str, num_tokens: int) -> int:
    """Bytes of keys, values and states of one sequence."""
    return sum(sub_block.state().num_bytes(num_tokens, precision) for sub_block in sub_blocks)


def allocated(sub_blocks: Iterable[SubBlock], precision: str, num_tokens: int, step: int) -> int:
    """Bytes of the pages of one sequence. step: one of STEPS."""
    attends, mambas = Counter[tuple[int, int | None]](), Counter[tuple[int, ...]]()
    largest = 0
    for one in sub_blocks:
        state = one.state()
        if isinstance(one, Gqa):
            attends[PRECISION_BYTES[precision] * state.per_token, state.reach] += 1
        elif isinstance(one, Recurrent):
            mambas[(*one.state_shape, one.conv_channels, one.conv_width)] += 1
            largest = max(largest, state.fixed_bytes(precision))
    if not attends:
        return 0
    widest = max(token for token, _ in attends)
    page = step * widest * max(1, -(-largest // (step * widest)))
    # One group of all layers, each with pages of its own size.
    if not mambas and len({reach for _, reach in attends}) == 1:
        pages = {token: _pages(num_tokens, step, reach) * step * token for token, reach in attends}
        return sum(pages[token] * count for (token, _), count in attends.items())
    counts = [*attends.values(), *mambas.values()]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    taken = [(count, 1) for count in mambas.values()]
    for (token, reach), count in attends.items():
        # One whose tokens fill no page exactly keeps its number of them, and leaves room.
        tokens = page // token if page % token == 0 else page // widest
        taken.append((count, _pages(num_tokens, tokens, reach)))
    return sum(-(-count // size) * pages for count, pages in taken) * size * page


def _pages(num_tokens: int, page: int, reach: int | None) -> int:
    """That a sequence has at its end; a window that moves on touches one more than it fills."""
    pages = -(-num_tokens // page)
    return pages if reach is None else min(pages, -(-reach // page) + 1)


def compare(sub_blocks: Iterable[SubBlock], told: Mapping[str, Any], precision: str, num_tokens: int) -> Held:
    """told: what `worker.py` says of the engine's layers and groups."""
    ours = list(sub_blocks)
    theirs = sum(
        one["per_token"] * min(num_tokens, one["window"] or num_tokens) + one["fixed"] for one in told["layers"]
    )
    taken = sum(
        _pages(num_tokens, group["tokens"], group["window"]) if group["tokens"] else 1 for group in told["groups"]
    )
    return Held(
        num_tokens=num_tokens,
        ours=kept(ours, precision, num_tokens),
        theirs=int(theirs),
        pages=allocated(ours, precision, num_tokens, STEPS["cpu" if told["on_cpu"] else "gpu"]),
        their_pages=int(taken * told["page_bytes"]),
    )
