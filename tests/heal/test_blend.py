"""Blends: proportions, epochs, order, chats, and what is said about a bad file."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.data.blend import read_blend
from puzzle.data.chats import render_chat, within
from puzzle.data.documents import Source
from puzzle.data.mixture import IGNORE, Mixture, Stage, Stream, load_data

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
        with pytest.raises(UserError, match="--allow-repeats"):
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


@pytest.fixture
def folder(tmp_path, corpus):
    """Text, another field, chats; and a function that writes a blend of them."""
    (tmp_path / "code").mkdir()
    for path in sorted(corpus.glob("*.py"))[:20]:
        (tmp_path / "code" / path.name).write_text(path.read_text())
    rows = [{"body": f"note {i} " + "words and more words " * 20} for i in range(60)]
    (tmp_path / "notes.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    chats = [
        {"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i} it is"}] * 3}
        for i in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(r) for r in chats))

    def write(text: str):
        path = tmp_path / "blend.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sources:\n- {path: code, wieght: 1}", ["source 1", "unknown key 'wieght'", "did you mean 'weight'"]),
        ("source:\n- {path: code}", ["unknown key 'source'", "did you mean 'sources'"]),
        ("sources:\n- {path: code}\n- {path: cod/x.jsonl}", ["source 2", "'cod/x.jsonl' does not exist"]),
        ("sources:\n- {path: 'code/**/*.rs'}", ["'code/**/*.rs' does not exist"]),
        ("sources:\n- {path: code, weight: 0}", ["weight 0", "above 0"]),
        ("sources:\n- {path: code, weight: -0.5}", ["weight -0.5", "above 0"]),
        ("sources:\n- {path: code, weight: much}", ["weight much", "above 0"]),
        ("sources:\n- {path: code, max_epochs: 0}", ["max_epochs 0", "above 0"]),
        ("sources:\n- {weight: 1}", ["`path` is None"]),
        ("sources: []", ["`sources` is empty"]),
        ("- code", ["no mapping"]),
        ("sources: [", ["cannot be read"]),
        ("sources:\n- {path: code}\n- {path: code}", ["two sources are called 'code'", "name"]),
        ("sources:\n- {path: chats.jsonl, messages: messages, loss: asistant}", ["loss 'asistant'", "'assistant'"]),
        ("sources:\n- {path: code, loss: assistant}", ["needs chats"]),
        ("sources:\n- {path: empty.jsonl}", ["source 'empty.jsonl' has no text"]),
        ("sources:\n- {path: notes.jsonl}", ["no text field 'text'", "body"]),
        ("sources:\n- {path: code, messages: messages}", ["no .jsonl or .parquet"]),
        ("sources:\n- {path: notes.jsonl, messages: messages}", ["no list of {role, content}", "body"]),
        ("sources:\n- {path: chats.jsonl, messages: messages}", ["no chat template"]),
        ("sources:\n- {path: notes.jsonl, text_field: body, max_epochs: 1}", ["max_epochs is 1", "--allow-repeats"]),
    ],
)
def test_bad_blends_get_one_line(puzzle, folder, child, parent, tmp_path, text, wanted):
    done = puzzle(
        "heal", child, "--teacher", parent, "--data-blend", folder(text), "--tokens", "1M", "--seq-len", 32,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 2, (done.output, done.exception)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for part in wanted:
        assert part in errors[0], errors[0]
    assert not (tmp_path / "out").exists()


def test_a_blend_heals(puzzle, folder, child, parent, tmp_path):
    blend = folder(
        "sources:\n- {path: code, weight: 3}\n- {path: notes.jsonl, weight: 1, text_field: body, max_epochs: 1}\n"
    )
    arguments = ("heal", child, "--teacher", parent, "--data-blend", blend, "--seq-len", 32, "--batch-size", 8)
    extra = ("--tokens", 4096, "--validation-sequences", 8, "--out", tmp_path / "out", "--json")
    done = puzzle(*arguments, *extra)
    assert done.exit_code == 0, (done.output, done.exception)
    sources = json.loads(done.stdout)["sources"]
    assert [s["share"] for s in sources] == [0.75, 0.25]
    assert [s["tokens"] for s in sources] == [3072, 1024]
    assert "| notes.jsonl | 25.0% | 1,024 |" in (tmp_path / "out/README.md").read_text()


def test_only_assistant_turns_count(parent):
    """What counts decodes to exactly what the assistant says, with its end-of-turn mark."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parent)
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello you"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]
    text, spans = render_chat(tokenizer, messages, "here")
    assert [text[a:b] for a, b in spans] == ["hello you<|endoftext|>", "see you<|endoftext|>"]
    found = tokenizer(text, return_offsets_mapping=True)
    kept = within(found["offset_mapping"], spans)
    assert tokenizer.decode(np.array(found["input_ids"])[kept].tolist()) == "hello you<|endoftext|>see you<|endoftext|>"


def test_chats_are_read_with_their_mask(folder, parent, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from puzzle.data import mixture

    folder("")
    tokenizer = AutoTokenizer.from_pretrained(parent)
    tokenizer.chat_template = TEMPLATE
    monkeypatch.setattr(mixture, "load_tokenizer", lambda directory: tokenizer)
    stages = [Stage(seq_len=64, batch_size=2, num_steps=4)]
    for loss in ("assistant", "all"):
        source = Source(name="chats", paths=(str(tmp_path / "chats.jsonl"),), messages="messages", loss=loss)
        data = load_data([source], parent, stages, num_validation=2)
        ids, labels = data.mixture.batch(0, 0)
        share = (labels != IGNORE).double().mean().item()
        assert share == 1 if loss == "all" else 0.1 < share < 0.6
        said = tokenizer.decode(labels[0][labels[0] != IGNORE].tolist())
        assert ("what is" in said) == (loss == "all")
        assert torch.equal(ids[:, 1:][labels[:, :-1] != IGNORE], labels[:, :-1][labels[:, :-1] != IGNORE])
        assert (data.validation[1] != IGNORE).any()


def test_a_template_that_rewrites_the_past_is_refused(parent):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parent)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    with pytest.raises(UserError, match="renders turn 2 differently"):
        render_chat(tokenizer, messages, "row 1")


def test_reading_a_blend(folder, tmp_path):
    found = read_blend(folder("sources:\n- {path: [code, notes.jsonl], name: both, weight: 2, max_epochs: 1.5}"))
    assert found == [
        Source(name="both", paths=(str(tmp_path / "code"), str(tmp_path / "notes.jsonl")), weight=2.0, max_epochs=1.5)
    ]
