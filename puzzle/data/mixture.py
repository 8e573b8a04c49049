"""Rows of tokens out of several sources in fixed proportions, every document as often as every other of its source.

A source is an endless stream: all its documents, then all of them again in a new seeded order, and so on. A stage draws
rows of T tokens; row i comes from the source that is furthest behind its share of the first i rows (largest deficit), so
the realised proportions differ from the weights by about a row, at any moment. Within an epoch the rows of a source are
visited in a seeded order. Nothing here depends on how many processes train or on when a run was stopped.

Letters: B sequences a step, T tokens of a row, N tokens of a source, S held-out rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from puzzle.base.console import progress
from puzzle.base.errors import UserError
from puzzle.data.documents import Source
from puzzle.data.tokenizer import load_tokenizer, vocabulary
from puzzle.data.tokens import SourceTokens, num_tokens, pack, read_source

IGNORE = -100  # the label of a token that does not count


class Piece(NamedTuple):
    """What a row has of a document. key: of the document; ids: of all of it; part: what of them is in the row."""

    key: tuple[int, int]
    ids: np.ndarray
    part: slice


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """num_steps steps of batch_size sequences of seq_len tokens."""

    seq_len: int
    batch_size: int
    num_steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.seq_len * self.batch_size

    @property
    def num_tokens(self) -> int:
        return self.tokens_per_step * self.num_steps


class Stream:
    """The documents of one source as an endless stream of tokens."""

    def __init__(
        self,
        name: str,
        documents: list[np.ndarray],
        *,
        counted: list[np.ndarray] | None = None,
        weight: float = 1.0,
        max_epochs: float | None = None,
        seed: int = 0,
    ):
        """documents: token ids [length] each; counted: of the same lengths, True where the loss counts (None: always)."""
        self.name, self.weight, self.max_epochs = name, weight, max_epochs
        self.lengths = np.array([len(d) for d in documents], dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())
        self._begins = np.cumsum(self.lengths) - self.lengths
        self._flat = np.concatenate(documents).astype(np.int32, copy=False)
        self._counted = None if counted is None else np.concatenate(counted)
        digest = hashlib.sha256(self._flat.data)
        if self._counted is not None:
            digest.update(self._counted.data)
        self.hash = digest.hexdigest()
        self._seed = [seed, int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)]
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of one epoch in their order, and where each ends in the epoch's tokens. [num_documents] each"""
        if epoch not in self._orders:
            if len(self._orders) > 3:
                self._orders.clear()
            picked = np.random.default_rng([*self._seed, epoch]).permutation(len(self.lengths))
            self._orders[epoch] = picked, np.cumsum(self.lengths[picked])
        return self._orders[epoch]

    def pieces(self, start: int, length: int) -> list[tuple[int, slice]]:
        """(document, part of it) of the tokens start … start + length of the stream."""
        found = []
        while length > 0:
            epoch, within = divmod(start, self.num_tokens)
            picked, ends = self.order(epoch)
            place = int(np.searchsorted(ends, within, side="right"))
            document = int(picked[place])
            offset = within - int(ends[place] - self.lengths[document])
            count = min(length, int(ends[place]) - within)
            found.append((document, slice(offset, offset + count)))
            start, length = start + count, length - count
        return found

    def document(self, number: int) -> np.ndarray:
        """Ids int32 [its length]."""
        return self._flat[self._begins[number] : self._begins[number] + self.lengths[number]]

    def take(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids int32 [length] from `start` on, and which of them count."""
        at = [
            slice(int(self._begins[d]) + part.start, int(self._begins[d]) + part.stop)
            for d, part in self.pieces(start, length)
        ]
        ids = np.concatenate([self._flat[s] for s in at])
        return ids, None if self._counted is None else np.concatenate([self._counted[s] for s in at])


def deficit_schedule(shares: np.ndarray, num_rows: int) -> np.ndarray:
    """The source of each row [num_rows] int16: always the one whose share so far is least served; ties: the first."""
    picked = np.zeros(num_rows, dtype=np.int16)
    if len(shares) == 1:
        return picked
    owed = np.zeros(len(shares))
    for row in range(num_rows):
        owed += shares
        best = int(owed.argmax())
        owed[best] -= 1
        picked[row] = best
    return picked


class Mixture:
    """All rows that a run trains on, by stage and step."""

    def __init__(self, streams: list[Stream], stages: list[Stage], *, seed: int = 0, allow_repeats: bool = False):
        """Raises UserError when a source would pass its max_epochs, unless repeats are allowed."""
        self.streams, self.stages = streams, stages
        self.shares = np.array([s.weight for s in streams]) / sum(s.weight for s in streams)
        self.drawn = np.zeros(len(streams), dtype=np.int64)  # tokens, over all stages
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []  # of each stage: the row's source, its first token
        for number, stage in enumerate(stages):
            sources = deficit_schedule(self.shares, stage.num_steps * stage.batch_size)
            starts = np.zeros(len(sources), dtype=np.int64)
            for index, stream in enumerate(streams):
                mine = np.flatnonzero(sources == index)
                first = self.drawn[index] + stage.seq_len * np.arange(len(mine), dtype=np.int64)
                keys = np.random.default_rng([seed, number, index]).random(len(mine))
                starts[mine] = first[np.lexsort((keys, first // stream.num_tokens))]
                self.drawn[index] += stage.seq_len * len(mine)
            self._rows.append((sources, starts))
        for stream, drawn in zip(streams, self.drawn, strict=True):
            epochs = drawn / stream.num_tokens
            if not allow_repeats and stream.max_epochs is not None and epochs > stream.max_epochs:
                raise UserError(
                    f"source '{stream.name}' would be read {epochs:.2f} times, its max_epochs is {stream.max_epochs:g}: "
                    f"it has {stream.num_tokens:,} tokens; lower its weight or `tokens`, or pass `allow_repeats`"
                )
        facts = [(s.name, s.weight, s.max_epochs, s.hash) for s in streams]
        text = json.dumps([facts, [asdict(stage) for stage in stages], seed], allow_nan=False)
        self.hash = hashlib.sha256(text.encode()).hexdigest()

    def rows(self, stage: int, step: int) -> list[tuple[int, int]]:
        """(source, first token) of the step's rows."""
        size = self.stages[stage].batch_size
        sources, starts = (values[step * size : (step + 1) * size] for values in self._rows[stage])
        return [(int(s), int(t)) for s, t in zip(sources, starts, strict=True)]

    def batch(self, stage: int, step: int, part: slice = slice(None)) -> Tensor:
        """Ids and labels [2, B, T] int64 of the step's rows, or of `part` of them. The label of a token is the next one."""
        length = self.stages[stage].seq_len
        rows = self.rows(stage, step)[part]
        found = np.empty((2, len(rows), length), dtype=np.int64)
        for index, (source, start) in enumerate(rows):
            ids, counted = self.streams[source].take(start, length + 1)
            found[0, index] = ids[:-1]
            found[1, index] = ids[1:] if counted is None else np.where(counted[1:], ids[1:], IGNORE)
        return torch.from_numpy(found)

    def documents(self, stage: int, step: int, part: slice = slice(None)) -> list[list[Piece]]:
        """What the rows of `batch` are cut from, the label of the last token included."""
        length = self.stages[stage].seq_len + 1
        return [
            [
                Piece((source, n), self.streams[source].document(n), cut)
                for n, cut in self.streams[source].pieces(start, length)
            ]
            for source, start in self.rows(stage, step)[part]
        ]

    def report(self) -> list[dict[str, Any]]:
        """Per source: what share of the tokens it gives, and how often each of its documents is read."""
        return [
            {
                "source": stream.name,
                "share": round(float(share), 6),
                "tokens": int(drawn),
                "available_tokens": stream.num_tokens,
                "epochs": round(float(drawn / stream.num_tokens), 4),
                "max_epochs": stream.max_epochs,
            }
            for stream, share, drawn in zip(self.streams, self.shares, self.drawn, strict=True)
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class HealData:
    """What a run trains on, and held-out ids and labels [2, S, T] int64 (labels -100 where the loss does not count), with what each of
    its rows is cut from."""

    mixture: Mixture
    validation: Tensor
    num_documents: int
    held_out: list[list[Piece]] = field(default_factory=list)


def load_data(
    sources: list[Source],
    tokenizer_dir: Path,
    stages: list[Stage],
    *,
    num_validation: int,
    seed: int = 0,
    allow_repeats: bool = False,
) -> HealData:
    """Read and tokenise each source until its share of all stages is there, or it ends.

    Raises UserError for an empty source, unreadable data, too little held-out text, or a source that would be repeated
    more often than it may.
    """
    tokenizer, limit = load_tokenizer(tokenizer_dir), vocabulary(tokenizer_dir)
    total = sum(stage.num_tokens for stage in stages)
    seq_len, weights = stages[0].seq_len, sum(source.weight for source in sources)
    read: list[SourceTokens] = []
    taken: set[bytes] = set()  # a document belongs to the first source that has it
    with progress("tokenise", 100) as bar:
        for source in sources:
            share = source.weight / weights
            num_train = share * total / min(1.0, source.max_epochs or 1.0) + stages[-1].seq_len
            wanted = num_train, max(1, round(share * num_validation)) * seq_len
            steps = int(100 * share)
            tokens = read_source(
                source, tokenizer, wanted, seed=seed, bar=bar, bar_steps=steps, vocab_size=limit, taken=taken
            )
            if not tokens.keys:
                raise UserError(f"source '{source.name}' has no text: every document is empty or in an earlier source")
            taken.update(tokens.keys)
            read.append(tokens)
    validation, held_out = _validation(sources, read, seq_len, num_validation)
    streams = [_stream(source, tokens, seed) for source, tokens in zip(sources, read, strict=True)]
    mixture = Mixture(streams, stages, seed=seed, allow_repeats=allow_repeats)
    return HealData(mixture=mixture, validation=validation, held_out=held_out, num_documents=len(taken))


def _stream(source: Source, tokens: SourceTokens, seed: int) -> Stream:
    ids = [document.ids for document in tokens.train]
    counted = [document.counted for document in tokens.train if document.counted is not None] or None
    if counted and not any(mask.any() for mask in counted):
        raise UserError(f"source '{source.name}' has no assistant turn: use `loss: all`, or check the roles")
    weight, max_epochs = source.weight, source.max_epochs
    return Stream(source.name, ids, counted=counted, weight=weight, max_epochs=max_epochs, seed=seed)


def _validation(
    sources: list[Source], read: list[SourceTokens], seq_len: int, num_rows: int
) -> tuple[Tensor, list[list[Piece]]]:
    """Held-out rows of all sources [2, S, T], and their pieces. With too few documents, the last ones of the largest source are held out; a
    source that is all held out trains on the last of them."""
    for tokens in read:
        if not tokens.train:
            tokens.lend(seq_len)
    if all(num_tokens(tokens.held_out) < seq_len for tokens in read):
        max(read, key=lambda tokens: (len(tokens.train), num_tokens(tokens.train))).lend(seq_len)
    weights = sum(source.weight for source in sources)
    parts, pieces = [], list[list[Piece]]()
    for number, (source, tokens) in enumerate(zip(sources, read, strict=True)):
        rows = max(1, round(num_rows * source.weight / weights))
        ids = pack([document.ids for document in tokens.held_out], seq_len, rows)
        masks = [np.ones(len(d.ids), dtype=bool) if d.counted is None else d.counted for d in tokens.held_out]
        labels = np.full_like(ids, IGNORE)
        labels[:, :-1] = np.where(pack(masks, seq_len, rows)[:, 1:], ids[:, 1:], IGNORE)
        parts.append(np.stack((ids, labels)))
        ends = np.cumsum([len(document.ids) for document in tokens.held_out])
        for start in range(0, ids.size, seq_len):
            first, last = np.searchsorted(ends, (start, start + seq_len - 1), side="right")
            own = ((n, tokens.held_out[n].ids) for n in range(first, last + 1))
            pieces.append([_piece((-1 - number, n), ids, start - int(ends[n]), seq_len) for n, ids in own])
    held_out = np.concatenate(parts, axis=1).astype(np.int64)
    if (held_out[1] == IGNORE).all():
        raise UserError(
            f"the data leave {sum(num_tokens(tokens.held_out) for tokens in read)} held-out tokens that count, less than "
            f"one sequence of {seq_len}: give more documents or a smaller `seq_len`"
        )
    return torch.from_numpy(held_out), pieces


def _piece(key: tuple[int, int], ids: np.ndarray, start: int, length: int) -> Piece:
    """start: where the row begins, from the end of this document."""
    begin = len(ids) + start
    return Piece(key, ids, slice(max(0, begin), min(len(ids), begin + length)))
