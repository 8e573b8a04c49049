"""The reader: each document once, in its split, until there is enough."""

from __future__ import annotations

import json

import numpy as np
import pytest

from puzzle.base.console import progress
from puzzle.data.documents import Source, is_held_out, text_key
from puzzle.data.tokens import Document, SourceTokens, num_tokens, pack, read_source


@pytest.fixture
def read(texts, tokenizer, tmp_path):
    """`read(wanted, ...)` reads the fixed texts, a blank one and a repeated one among them."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (" \n", *texts)))
    source = Source(name="texts", paths=(str(tmp_path / "texts.jsonl"),))

    def run(*wanted: float, **options) -> SourceTokens:
        with progress("tokenise", 10) as bar:
            return read_source(source, tokenizer, wanted, seed=0, bar=bar, bar_steps=10, **options)

    return run


def test_each_document_once_in_its_split(read, texts, tokenizer):
    tokens = read(1e9, 1e9)
    different = list(dict.fromkeys(texts))
    for held_out, documents in ((False, tokens.train), (True, tokens.held_out)):
        assert all(document.ids[0] == 256 and document.counted is None for document in documents)
        split = [tokenizer.decode(document.ids[1:].tolist()) for document in documents]
        assert split == [text for text in different if is_held_out(text_key(text)) == held_out]
    assert tokens.keys == [text_key(text) for text in different]
    assert tokens.num_seen == len(different) == 180


def test_a_full_split_takes_no_more(read, texts):
    """Whole batches of documents are read, so that a split ends some documents after it is full."""
    whole, tokens = read(1e9, 1e9), read(500, 1e9)
    assert len(whole.train) > len(tokens.train)
    assert all((a.ids == b.ids).all() for a, b in zip(whole.train, tokens.train, strict=False))
    assert num_tokens(tokens.train) >= 500
    assert num_tokens(tokens.held_out) == num_tokens(whole.held_out)
    assert len(tokens.keys) == len(tokens.train) + len(tokens.held_out) < tokens.num_seen
    assert read(500, 1).num_seen < tokens.num_seen


def test_what_another_source_has_is_left_out(read):
    whole = read(1e9, 1e9)
    rest = read(1e9, 1e9, taken=set(whole.keys[:100]))
    assert rest.keys == whole.keys[100:]
    assert read(1e9, 1e9, taken=whole.keys) == SourceTokens()


def test_documents_are_lent_whole_and_one_stays():
    documents = [Document(np.full(length, length, dtype=np.int32), None) for length in (3, 4, 5)]
    tokens = SourceTokens(train=documents)
    tokens.lend(0)
    assert not tokens.held_out
    tokens.lend(6)
    assert [len(document.ids) for document in tokens.held_out] == [5, 4]
    tokens.lend(1000)
    assert len(tokens.train) == 1


@pytest.mark.parametrize(
    ("train", "held_out", "count", "wanted"),
    [
        ([1000], [], 10, [980, 20]),
        ([1000], [], 100, [900, 100]),
        ([100, 50], [], 60, [90, 60]),
        ([60], [], 60, [60, 0]),
        ([], [1000], 60, [940, 60]),
        ([], [30, 1000], 60, [970, 60]),
    ],
)
def test_one_document_lends_its_tail(train, held_out, count, wanted):
    """And one that is held out itself is lent to training; ids and masks part at the same place, nothing is in both."""
    tokens = SourceTokens(
        *([Document(np.arange(n), np.arange(n) % 2 == 0) for n in split] for split in (train, held_out))
    )
    tokens.lend(count)
    assert [num_tokens(tokens.train), num_tokens(tokens.held_out)] == wanted
    for document in (*tokens.train, *tokens.held_out):
        assert (document.counted == (document.ids % 2 == 0)).all()


def test_packing():
    parts = [np.arange(3), np.arange(3, 7)]
    assert pack(parts, 2, 9).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert pack(parts, 2, 1).tolist() == [[0, 1]]
    assert pack(parts, 8, 1).shape == (0, 8)
    assert pack([], 4, 1).shape == (0, 4)
