"""Mixtures: proportions, epochs, order, and what is read for them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.data.documents import Source
from puzzle.data.mixture import IGNORE, Mixture, Stage, Stream, load_data


def stream(name: str, lengths: list[int], first: int, **options) -> Stream:
    """Documents whose every token tells where it comes from."""
    ends = np.cumsum(lengths)
    tokens = np.arange(first, first + ends[-1], dtype=np.int32)
    return Stream(name, np.split(tokens, ends[:-1]), **options)


@settings(max_examples=60, deadline=None)
@given(
    sources=st.lists(
        st.tuples(st.floats(0.05, 1), st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 5)),
        min_size=1,
        max_size=5,
    ),
    steps=st.lists(st.integers(1, 120), min_size=1, max_size=2),
    seq_len=st.integers(2, 24),
    batch=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_proportions_and_repeats(sources, steps, seq_len, batch, seed):
    """Realised token shares differ from the weights by less than 1 % (or a row each, in short runs); no document is read
    more often than max_epochs, and within an epoch every token exactly once."""
    stages = [Stage(seq_len=seq_len * (i + 1), batch_size=batch, num_steps=n) for i, n in enumerate(steps)]
    streams = [
        stream(f"s{i}", lengths, i * 100_000, weight=weight, max_epochs=epochs, seed=seed)
        for i, (weight, lengths, epochs) in enumerate(sources)
    ]
    total = sum(stage.num_tokens for stage in stages)
    shares = [s.weight / sum(x.weight for x in streams) for s in streams]
    mixture = Mixture(streams, stages, seed=seed, allow_repeats=True)
    if any(d > s.max_epochs * s.num_tokens for d, s in zip(mixture.drawn, streams, strict=True)):
        with pytest.raises(UserError, match="`allow_repeats`"):
            Mixture(streams, stages, seed=seed)
        return
    mixture = Mixture(streams, stages, seed=seed)
    seen: Counter = Counter()
    for number, stage in enumerate(stages):
        for step in range(stage.num_steps):
            ids, labels = mixture.batch(number, step)
            assert ids.shape == (stage.batch_size, stage.seq_len)
            assert torch.equal(ids[:, 1:], labels[:, :-1])
            seen.update(ids.flatten().tolist())
    assert sum(seen.values()) == total
    longest = stages[-1].seq_len
    for index, source in enumerate(streams):
        own = {token: n for token, n in seen.items() if token // 100_000 == index}
        drawn = sum(own.values())
        assert drawn == mixture.drawn[index]
        assert abs(drawn / total - shares[index]) < max(0.01, len(stages) * len(streams) * longest / total)
        assert max(own.values(), default=0) <= source.max_epochs
        whole = drawn // source.num_tokens
        if len(stages) == 1 and whole:
            assert len(own) == source.num_tokens
            assert set(own.values()) <= {whole, whole + 1}


def test_long_runs_meet_the_weights_within_one_percent():
    weights = (0.62, 0.3, 0.07, 0.01)
    streams = [stream(f"s{i}", [40] * 50, i * 10_000, weight=w) for i, w in enumerate(weights)]
    mixture = Mixture(streams, [Stage(seq_len=16, batch_size=8, num_steps=250)])
    for weight, line in zip(weights, mixture.report(), strict=True):
        assert line["tokens"] / (16 * 8 * 250) == pytest.approx(weight, rel=0.01, abs=1e-3)


def test_parts_of_a_batch_make_the_batch_and_seeds_differ():
    def make(seed):
        return Mixture(
            [stream("a", [7, 30, 11, 90], 0, seed=seed)], [Stage(seq_len=8, batch_size=4, num_steps=9)], seed=seed
        )

    whole = make(0).batch(0, 3)
    parts = [make(0).batch(0, 3, slice(i, i + 2)) for i in (0, 2)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert not torch.equal(make(1).batch(0, 3), whole)


def test_chats_are_read_with_their_mask(folder, byte_model, tokenizer, tmp_path):
    stages = [Stage(seq_len=64, batch_size=2, num_steps=4)]
    for loss in ("assistant", "all"):
        source = Source(name="chats", paths=(str(tmp_path / "chats.jsonl"),), messages="messages", loss=loss)
        data = load_data([source], byte_model, stages, num_validation=2)
        ids, labels = data.mixture.batch(0, 0)
        share = (labels != IGNORE).double().mean().item()
        assert share == 1 if loss == "all" else 0.1 < share < 0.6
        said = tokenizer.decode(labels[0][labels[0] != IGNORE].tolist())
        assert ("what is" in said) == (loss == "all")
        assert torch.equal(ids[:, 1:][labels[:, :-1] != IGNORE], labels[:, :-1][labels[:, :-1] != IGNORE])
        assert (data.validation[1] != IGNORE).any()


def test_a_blend_is_the_same_in_every_version(byte_model, texts, tmp_path):
    """Rows of text and of chats, shares, held-out rows: fixed, or an interrupted healing goes on with other data."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    talks = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": t}] for i, t in enumerate(texts)]
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps({"talk": talk}) for talk in talks))
    sources = [
        Source(name="texts", paths=(str(tmp_path / "texts.jsonl"),), weight=0.3, max_epochs=2),
        Source(name="talks", paths=(str(tmp_path / "talks.jsonl"),), weight=0.1, messages="talk", loss="assistant"),
    ]
    stages = [Stage(seq_len=16, batch_size=8, num_steps=40), Stage(seq_len=64, batch_size=2, num_steps=10)]
    data = load_data(sources, byte_model, stages, num_validation=10)
    assert data.mixture.hash == "01efd383e9563df718ff04843d4b8d2782263a8f072bf85529cf7c8f996e7aa7"
    held_out = hashlib.sha256(data.validation.numpy().tobytes()).hexdigest()
    assert held_out == "b2caf0cfc92ca5ab7e73424290e5eb7816fcf544e11f3d34e8f406fd4be7cd69"
    assert data.validation.shape == (2, 10, 16)
    assert data.num_documents == 130
