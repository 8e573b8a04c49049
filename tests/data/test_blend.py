"""Blend files: what is read, what is said about a bad one, and that a healing follows one."""

from __future__ import annotations

import json

import pytest

from puzzle.data.blend import read_blend
from puzzle.data.documents import Source


def test_reading_a_blend(folder, tmp_path):
    found = read_blend(folder("sources:\n- {path: [code, notes.jsonl], name: both, weight: 2e0, max_epochs: 15e-1}"))
    assert found == [
        Source(name="both", paths=(str(tmp_path / "code"), str(tmp_path / "notes.jsonl")), weight=2.0, max_epochs=1.5)
    ]


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
        ("sources:\n- {path: code, messages: messages}", ["no .jsonl, .ndjson, .json or .parquet"]),
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
