"""Two tokenizers over one text: which tokens of both stand for the same bytes at the same place.

The text is what a child's tokens of a whole document stand for; the other tokenizer reads it anew. Tokens are compared as bytes, since
byte-level pieces may end inside a character. Special tokens correspond by their role (end, begin, padding, …), or not at all.
Letters: V vocabulary, C words that both know, N tokens of a document, M of the other tokenizer, T tokens of a row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from puzzle.base.errors import UserError
from puzzle.data.mixture import Piece
from puzzle.data.tokenizer import load_tokenizer, same_tokenizer, separator_id

ROLES = ("eos", "bos", "pad", "unk", "sep", "cls", "mask")
MOST = 4096  # documents that are remembered
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet shows as themselves
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
ALPHABET = {chr(b): b for b in _PLAIN} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


def word_bytes(tokenizer: Any, directory: Path) -> dict[int, bytes]:
    """What every token stands for, by id; single bytes that SentencePiece falls back on come first.

    Raises UserError for a tokenizer whose tokens are not bytes of the text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (
        ""
        if backend is None
        else json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False, allow_nan=False)
    )
    if "ByteLevel" not in decoder and "▁" not in decoder:
        raise UserError(
            f"`align_tokens`: the tokenizer in {directory} is neither a byte-level BPE nor SentencePiece's in a tokenizer.json, so that "
            "its tokens have no places in the text; let the teacher write texts, and learn from those"
        )

    def read(piece: str) -> bytes:
        if "ByteLevel" in decoder:
            return bytes(ALPHABET[c] for c in piece) if all(c in ALPHABET for c in piece) else piece.encode()
        return bytes([int(piece[3:5], 16)]) if _is_byte(piece) else piece.replace("▁", " ").encode()

    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (not _is_byte(item[0]), item[1]))
    added = {number: token.content.encode() for number, token in tokenizer.added_tokens_decoder.items()}
    return {number: added[number] if number in added else read(piece) for piece, number in vocabulary}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


class Both(NamedTuple):
    """A document. other: its tokens [M]; ends: of each token [N] in bytes, and begins and ends of the other's [M]; same [N]: the place of
    the other's token that stands for the same, -1 where there is none."""

    other: np.ndarray
    ends: np.ndarray
    other_begins: np.ndarray
    other_ends: np.ndarray
    same: np.ndarray


class Aligner:
    """words [2, C]: ids of what both know. sizes: words of either model."""

    def __init__(self, own: Path, other: Path, sizes: tuple[int, int]):
        """Raises UserError as `word_bytes` does."""
        self.tokenizers = [load_tokenizer(place) for place in (own, other)]
        self.bytes = [word_bytes(t, place) for t, place in zip(self.tokenizers, (own, other), strict=True)]
        self.separators = [separator_id(t) for t in self.tokenizers]
        self.adds_space = b"".join(self.bytes[0][n] for n in self._encoded(0, "a")) == b" a"
        alike = same_tokenizer(own, other)
        pairs = {n: n for n in range(min(sizes))} if alike else self._pairs()
        kept = sorted((a, b) for a, b in pairs.items() if a < sizes[0] and b < sizes[1])
        self.words = np.array(kept, dtype=np.int64).reshape(-1, 2).T
        self.partner = np.full(max(sizes[0], max(self.bytes[0]) + 1), -1)
        self.partner[self.words[0]] = self.words[1]
        self._known: dict[tuple[int, int], Both] = {}

    def _encoded(self, side: int, text: str) -> list[int]:
        ids: list[int] = self.tokenizers[side](text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _pairs(self) -> dict[int, int]:
        found = [self.separators, *([getattr(t, f"{role}_token_id") for t in self.tokenizers] for role in ROLES)]
        pairs: dict[int, int] = {}
        for a, b in found:
            if a is not None and b is not None and b not in pairs.values():
                pairs.setdefault(a, b)
        own, other = (
            {data: n for n, data in words.items() if data and n not in special}
            for words, special in zip(self.bytes, map(_special, self.tokenizers), strict=True)
        )
        return {n: other[data] for data, n in own.items() if data in other} | pairs

    def document(self, ids: np.ndarray) -> Both:
        """Of a whole document [N], or of what a split left of one. Where the other tokenizer changes the text, no token is the same."""
        first = int(ids[0] == self.separators[0])
        words = [self.bytes[0][n] for n in ids[first:].tolist()]
        text = b"".join(words)
        space = int(first and self.adds_space and text[:1] == b" ")  # stands before the text
        text = text[space:]
        skip = next((n for n, byte in enumerate(text[:4]) if byte & 0xC0 != 0x80), 0)  # a character that was cut
        readable = _decoded(text[skip:])
        read = self._encoded(1, readable)
        others = [self.bytes[1][n] for n in read]
        found = b"".join(others)
        other_space = int(found == b" " + readable.encode())
        if found[other_space:] != readable.encode():
            read, others = [], []
        begins, ends = _places(first, words, 1 - space)
        other_begins, other_ends = _places(first, others, 1 - other_space + skip)
        other = np.array(self.separators[1:] * first + read, dtype=np.int64)
        if not len(other):
            return Both(other, ends, other_begins, other_ends, np.full(len(ids), -1))
        place = np.searchsorted(other_ends, ends).clip(max=len(other) - 1)
        same = (other_ends[place] == ends) & (other_begins[place] == begins) & (self.partner[ids] == other[place])
        return Both(other, ends, other_begins, other_ends, np.where(same, place, -1))

    def row(self, pieces: list[Piece], length: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the other [≤ longest] of a row, and after which of them, for each of its T tokens, the same comes next: [T], -1 where
        nothing does."""
        ids, places, count = [], [], 0
        for piece in pieces:
            if piece.key not in self._known:
                if len(self._known) >= MOST:
                    self._known.clear()
                self._known[piece.key] = self.document(piece.ids)
            found, part = self._known[piece.key], piece.part
            first = int(np.searchsorted(found.other_begins, found.ends[part.start - 1] if part.start else 0))
            last = max(first, int(np.searchsorted(found.other_ends, found.ends[part.stop - 1], side="right")))
            same = found.same[part]
            places.append(np.where((same >= first) & (same < last), same - first + count, -1))
            ids.append(found.other[first:last])
            count += last - first
        before = np.concatenate(places)[1 : length + 1] - 1
        before = np.pad(before, (0, length - len(before)), constant_values=-1).clip(min=-1)
        return np.concatenate(ids)[:longest], np.where(before < longest, before, -1)


def _places(first: int, words: list[bytes], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Where tokens begin and end: a separator at 0, the text after it from 1 on, with a place for a space before it."""
    sizes = np.array([1] * first + [len(word) for word in words], dtype=np.int64)
    ends = np.cumsum(sizes)
    ends[first:] += start
    return ends - sizes, ends


def _special(tokenizer: Any) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _decoded(data: bytes) -> str:
    """Up to a character that is cut at the end; nothing where one is broken before."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode() if error.start >= len(data) - 3 else ""
