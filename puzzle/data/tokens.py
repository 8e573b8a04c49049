"""The one reader of all verbs: documents of a source in, token ids out, each document once, by split.

`packing` makes sequences of them for building, scores and evaluation, `mixture` the rows of a healing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from puzzle.base.console import Bar
from puzzle.base.errors import UserError
from puzzle.data.chats import Span, chats, within
from puzzle.data.documents import Source, documents, is_held_out, text_key
from puzzle.data.tokenizer import separator_id

BATCH = 64  # documents tokenised together


class Document(NamedTuple):
    """ids: int32 [length], the separator first. counted: bool [length], which tokens the loss counts; None: all."""

    ids: np.ndarray
    counted: np.ndarray | None


@dataclass(slots=True)
class SourceTokens:
    """What was read of one source. keys: of its documents, in their order. num_seen: different documents that were looked
    at, those that were not needed included."""

    train: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_seen: int = 0

    def lend(self, count: int) -> None:
        """Hold out the last training documents, whole, until `count` tokens are held out or one document is left; of that
        one its tail, as many tokens as are missing or a fiftieth of it, whichever is more. Where all are held out, the last
        one trains."""
        if not self.train and self.held_out:
            self.train.append(self.held_out.pop())
        while num_tokens(self.held_out) < count and len(self.train) > 1:
            self.held_out.append(self.train.pop())
        missing = count - num_tokens(self.held_out)
        if missing > 0 and self.train and len(self.train[0].ids) > missing:
            ids, counted = self.train.pop()
            at = len(ids) - max(missing, len(ids) // 50)
            for part, found in ((self.train, slice(at)), (self.held_out, slice(at, None))):
                part.append(Document(ids[found], None if counted is None else counted[found]))


def num_tokens(documents: list[Document]) -> int:
    return sum(len(document.ids) for document in documents)


def pack(parts: list[np.ndarray], seq_len: int, num_rows: int) -> np.ndarray:
    """The joined parts as [rows, seq_len]: `num_rows` of them, or fewer where they end."""
    rows = min(num_rows, sum(len(part) for part in parts) // seq_len)
    joined = np.concatenate(parts) if rows else np.empty(0, dtype=np.int32)
    return joined[: rows * seq_len].reshape(rows, seq_len)


def read_source(
    source: Source,
    tokenizer: Any,
    wanted: tuple[float, float],
    *,
    seed: int,
    bar: Bar,
    bar_steps: int,
    vocab_size: int | None = None,
    taken: Collection[bytes] = (),
) -> SourceTokens:
    """Tokenise until there are `wanted` training and held-out tokens, or the source ends.

    Left out are blank documents, repeated ones, and those whose keys are in `taken`. bar advances by `bar_steps` in all.
    Raises UserError for a tokenizer without a separator, ids that are not below vocab_size, and as `documents` and `chats` do; an
    empty source is no error.
    """
    separator, masked = separator_id(tokenizer), source.loss == "assistant"
    plain = ((text, list[Span]()) for text in documents(source, seed))
    texts = plain if source.messages is None else chats(source, tokenizer, seed)
    tokens, lengths, seen, shown = SourceTokens(), [0, 0], set[bytes](), 0  # lengths: tokens of both splits so far

    def choose() -> Iterator[tuple[bool, str, list[Span]]]:
        """(whether it is held out, text, spans) of what is to be tokenised, until both splits are long enough."""
        for text, spans in texts:
            key = text_key(text)
            if key in seen or key in taken or not text.strip():
                continue
            seen.add(key)
            split = is_held_out(key)
            if lengths[split] < wanted[split]:
                tokens.keys.append(key)
                yield split, text, spans
            elif lengths[not split] >= wanted[not split]:
                return

    chosen = choose()
    while batch := list(islice(chosen, BATCH)):
        encoded = tokenizer(
            [text for _, text, _ in batch], verbose=False, add_special_tokens=False, return_offsets_mapping=masked
        )
        for index, (held_out, _, spans) in enumerate(batch):
            ids = np.array([separator, *encoded["input_ids"][index]], dtype=np.int32)
            if vocab_size is not None and ids.max() >= vocab_size:
                raise UserError(
                    f"the tokenizer in {tokenizer.name_or_path} gives token id {ids.max()}, but config.json says vocab_size "
                    f"{vocab_size}: the tokenizer does not belong to these weights"
                )
            counted = np.append(False, within(encoded["offset_mapping"][index], spans)) if masked else None
            (tokens.held_out if held_out else tokens.train).append(Document(ids, counted))
            lengths[held_out] += len(ids)
        done = int(bar_steps * sum(map(min, lengths, wanted)) / sum(wanted))
        bar.advance(done - shown)
        shown = done
    bar.advance(bar_steps - shown)
    tokens.num_seen = len(seen)
    return tokens
