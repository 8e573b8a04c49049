"""From the sources of a blend to streams of token ids: text as it is, chats through the tokenizer's chat template.

The held-out documents are those of `puzzle.data`: by the hash of the text, so that a text held out by one verb is held out
by all. Letters: T tokens of a row.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puzzle.base.console import Bar, progress
from puzzle.base.errors import UserError
from puzzle.data.blend import Source
from puzzle.data.rows import IGNORE, Mixture, Stage, Stream
from puzzle.data.tokens import TABLE_SUFFIXES, documents, is_validation, json_lines, load_tokenizer, open_parquet

BATCH = 64  # documents tokenised together


@dataclass(frozen=True, kw_only=True, slots=True)
class HealData:
    """What a run trains on, and held-out ids and labels [2, S, T] int64 (labels -100 where the loss does not count)."""

    mixture: Mixture
    validation: Tensor
    num_documents: int


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
    tokenizer = load_tokenizer(tokenizer_dir)
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if separator is None:
        raise UserError(f"the tokenizer in {tokenizer_dir} has neither an end nor a begin token to join documents")
    total = sum(stage.num_tokens for stage in stages)
    seq_len, weights = stages[0].seq_len, sum(source.weight for source in sources)
    readers = []
    seen: set[bytes] = set()
    with progress("tokenise", 100) as bar:
        for source in sources:
            share = source.weight / weights
            wanted = share * total / min(1.0, source.max_epochs or 1.0) + stages[-1].seq_len
            held = max(1, round(share * num_validation)) * seq_len
            reader = _Reader(source, tokenizer, separator, seen)
            reader.read(seed, wanted, held, bar, 100 * share)
            readers.append(reader)
    validation = _validation(readers, seq_len, num_validation)
    streams = [reader.stream(seed) for reader in readers]
    mixture = Mixture(streams, stages, seed=seed, allow_repeats=allow_repeats)
    return HealData(mixture=mixture, validation=validation, num_documents=len(seen))


class _Reader:
    """The documents of one source, tokenised, by split."""

    def __init__(self, source: Source, tokenizer: Any, separator: int, seen: set[bytes]):
        self.source, self.tokenizer, self.separator, self.seen = source, tokenizer, separator, seen
        self.ids: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self.counted: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self.lengths = {False: 0, True: 0}

    def read(self, seed: int, wanted: float, held: int, bar: Bar, percent: float) -> None:
        """Until `wanted` training and `held` held-out tokens are there. percent: what `bar` advances by."""
        limits = {False: wanted, True: float(held)}
        pending: list[tuple[bool, str, Any]] = []
        shown = 0
        for text, chat in self._texts(seed):
            key = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
            if key in self.seen or not text.strip():
                continue
            split = is_validation(text)
            if self.lengths[split] >= limits[split]:
                if self.lengths[not split] >= limits[not split]:
                    break
                continue  # this split is full: only the other one still needs documents
            self.seen.add(key)
            pending.append((split, text, chat))
            if len(pending) >= BATCH:
                self._tokenise(pending)
                done = int(percent * min(1.0, self.lengths[False] / wanted))
                bar.advance(done - shown)
                shown = done
        self._tokenise(pending)
        bar.advance(int(percent) - shown)
        if not self.ids[False] and not self.ids[True]:
            raise UserError(f"source '{self.source.name}' has no text: every document is empty or in an earlier source")

    def _texts(self, seed: int) -> Iterator[tuple[str, Any]]:
        """(text, spans of the assistant's turns or None)"""
        if self.source.messages is None:
            for text in documents(list(self.source.paths), self.source.text_field, seed):
                yield text, None
        else:
            for where, messages in chats(self.source, seed):
                yield render_chat(self.tokenizer, messages, where)

    def _tokenise(self, pending: list[tuple[bool, str, Any]]) -> None:
        if not pending:
            return
        chat = self.source.messages is not None
        found = self.tokenizer(
            [text for _, text, _ in pending],
            verbose=False,
            add_special_tokens=False,
            return_offsets_mapping=chat,
        )
        for index, (split, _, spans) in enumerate(pending):
            ids = np.array([self.separator, *found["input_ids"][index]], dtype=np.int32)
            counted = np.ones(len(ids), dtype=bool)
            if self.source.loss == "assistant":
                counted[0] = False
                counted[1:] = within(found["offset_mapping"][index], spans)
            self.ids[split].append(ids)
            self.counted[split].append(counted)
            self.lengths[split] += len(ids)
        pending.clear()

    def stream(self, seed: int) -> Stream:
        if not self.ids[False]:
            raise UserError(f"source '{self.source.name}' has held-out documents only: give it more documents")
        masked = self.source.loss == "assistant"
        if masked and not any(counted.any() for counted in self.counted[False]):
            raise UserError(f"source '{self.source.name}' has no assistant turn: use `loss: all`, or check the roles")
        return Stream(
            self.source.name,
            self.ids[False],
            counted=self.counted[False] if masked else None,
            weight=self.source.weight,
            max_epochs=self.source.max_epochs,
            seed=seed,
        )


def _validation(readers: list[_Reader], seq_len: int, num_rows: int) -> Tensor:
    """Held-out rows of all sources [2, S, T]. With too few documents, the last ones of the largest source are held out."""
    if all(reader.lengths[True] < seq_len for reader in readers):
        largest = max(readers, key=lambda r: len(r.ids[False]))
        while largest.lengths[True] < seq_len and len(largest.ids[False]) > 1:
            for kept in (largest.ids, largest.counted):
                kept[True].append(kept[False].pop())
            moved = len(largest.ids[True][-1])
            largest.lengths[True] += moved
            largest.lengths[False] -= moved
    weights = sum(reader.source.weight for reader in readers)
    found = []
    for reader in readers:
        rows = min(max(1, round(num_rows * reader.source.weight / weights)), reader.lengths[True] // seq_len)
        if rows == 0:
            continue
        ids = np.concatenate(reader.ids[True])[: rows * seq_len].astype(np.int64).reshape(rows, seq_len)
        counted = np.concatenate(reader.counted[True])[: rows * seq_len].reshape(rows, seq_len)
        labels = np.full_like(ids, IGNORE)
        labels[:, :-1] = np.where(counted[:, 1:], ids[:, 1:], IGNORE)
        found.append(np.stack((ids, labels)))
    if not found or all((part[1] == IGNORE).all() for part in found):
        lengths = sum(reader.lengths[True] for reader in readers)
        raise UserError(
            f"the data leave {lengths} held-out tokens that count, less than one sequence of {seq_len}: give more "
            "documents or a smaller --seq-len"
        )
    return torch.from_numpy(np.concatenate(found, axis=1))


def chats(source: Source, seed: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(where it stands, messages) of every row of the source's .jsonl and .parquet files, files in a seeded order."""
    files: list[Path] = []
    for text in source.paths:
        path = Path(text)
        found = (
            [path]
            if path.is_file()
            else path.rglob("*")
            if path.is_dir()
            else map(Path, glob.glob(text, recursive=True))
        )
        files += [p for p in found if p.suffix in TABLE_SUFFIXES and p.is_file()]
    if not files:
        raise UserError(f"source '{source.name}' has no .jsonl or .parquet file: chats are read from these alone")
    for path in sorted(files, key=lambda p: hashlib.sha256(f"{seed}:{p.name}".encode()).digest()):
        for number, row in enumerate(_table(path), 1):
            messages = row.get(source.messages) if isinstance(row, dict) else None
            where = f"{path} row {number}"
            if not isinstance(messages, list) or not all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            ):
                fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(
                    f"{where} has no list of {{role, content}} in field '{source.messages}' (it has: {fields}): set `messages`"
                )
            yield where, messages


def _table(path: Path) -> Iterator[Any]:
    if path.suffix == ".jsonl":
        yield from (row for _, row in json_lines(path))
        return
    for batch in open_parquet(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the character spans [start, end) that the assistant writes, its end-of-turn mark included.

    A turn's span is what the template adds to the prompt for it. Raises UserError when the tokenizer has no template, the
    template refuses the chat, or renders earlier turns differently once later ones follow.
    """

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja's own error types, or transformers' when there is no template
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{where}: the tokenizer's chat template does not take this chat ({reason})") from error

    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template; add chat_template.jinja beside tokenizer.json")
    text = render(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(index, True) if index else ""
        after = render(index + 1, False)
        if not text.startswith(after) or not after.startswith(before):
            raise UserError(
                f"{where}: the chat template renders turn {index + 1} differently when others follow, so that its tokens "
                "cannot be told apart: split the chat into one row per assistant turn"
            )
        spans.append((len(before), len(after.rstrip())))
    return text, spans


def within(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens, given by their character offsets, begin inside one of the spans. [num_tokens] bool"""
    begins = np.array([begin for begin, _ in offsets], dtype=np.int64)
    found = np.zeros(len(begins), dtype=bool)
    for start, end in spans:
        found |= (begins >= start) & (begins < end)
    return found
