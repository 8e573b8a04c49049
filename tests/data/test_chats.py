"""Chats as text: which of it the assistant says, where they are read, and chats that cannot be told apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from puzzle.base.errors import UserError
from puzzle.data.chats import chats, render_chat, within
from puzzle.data.documents import Source


def test_only_assistant_turns_count(tokenizer):
    """What counts decodes to exactly what the assistant says, with its end-of-turn mark."""
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


def test_a_template_that_rewrites_the_past_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    with pytest.raises(UserError, match="renders turn 2 differently"):
        render_chat(tokenizer, messages, "row 1")


def test_files_are_ordered_by_name_and_rows_stay_in_order(tokenizer, tmp_path):
    """Wherever the files lie; and a .parquet file reads as the .jsonl file of the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(folder: Path) -> tuple[str]:
        folder.mkdir(parents=True)
        for name in "abc":
            rows = [{"talk": [{"role": "user", "content": f"{name}{i}"}], "id": i} for i in range(2)]
            if name == "b":
                pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet")
            else:
                (folder / f"{name}.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
        (folder / "notes.txt").write_text("no chat")
        return (str(folder.parent),)

    places = [write(tmp_path / "one" / "x"), write(tmp_path / "two" / "y")]
    sources = [Source(name="talks", paths=paths, messages="talk") for paths in places]
    one, two = ([text for text, _ in chats(source, tokenizer, 0)] for source in sources)
    assert one == two
    said = "".join(text.removeprefix("<user>")[:2] for text in one)
    assert sorted(said[i : i + 4] for i in (0, 4, 8)) == ["a0a1", "b0b1", "c0c1"]
    assert {tuple(t for t, _ in chats(sources[0], tokenizer, seed)) for seed in range(9)} != {tuple(one)}


def test_parts_of_a_turn_are_joined(tokenizer, tmp_path):
    path = tmp_path / "a.JSON"
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "you"}]
    path.write_text(json.dumps([{"talk": [{"role": "user", "content": c}]} for c in (parts, "hello you")]))
    one, two = chats(Source(name="talks", paths=(str(path),), messages="talk"), tokenizer, 0)
    assert one == two


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url"}], "line 1 turn 1 has a part of type 'image_url'"),
        (["a"], "line 1 turn 1 has a part of type 'str': only {type: text, text: …} is read"),
        ("\ud83d", r"line 1 has half a surrogate pair, '\\ud83d'"),
        (None, "line 1 has no list of {role, content}"),
    ],
)
def test_turns_that_are_no_text(tokenizer, tmp_path, content, wanted):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"talk": [{"role": "user", "content": content}]}))
    with pytest.raises(UserError, match=wanted):
        list(chats(Source(name="talks", paths=(str(path),), messages="talk"), tokenizer, 0))


def test_rows_without_chats(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    for row, wanted in (('{"text": "a"}', "it has: text"), ("[1]", "it has: list"), ('{"talk": "hi"}', "it has: talk")):
        path.write_text(f"\n{row}\n")
        with pytest.raises(UserError, match=rf"a.jsonl line 2 has no list of .* in field 'talk' \({wanted}\): set"):
            list(chats(Source(name="talks", paths=(str(path),), messages="talk"), tokenizer, 0))
