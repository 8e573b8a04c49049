"""Files of a place, and texts of a file."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puzzle.base.errors import UserError
from puzzle.data.files import in_seeded_order, list_files, read_field, read_texts


@pytest.fixture
def place(tmp_path):
    for name in ("b.py", "a.txt", "sub/c.jsonl", "sub/a.txt", "log.log"):
        path = tmp_path / "place" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "place"


def test_names_are_relative_to_the_place(place, monkeypatch):
    """So that the order of files does not change when a folder moves."""

    def names(text: str) -> list[str]:
        return [name for name, _ in list_files(text) or []]

    assert names(str(place)) == ["a.txt", "b.py", "sub/a.txt", "sub/c.jsonl"]
    assert names(f"{place}/a.txt") == ["a.txt"]
    assert names(f"{place}/*.log") == ["place/log.log"]
    assert names(f"{place}/su*/*.txt") == ["sub/a.txt"]
    monkeypatch.chdir(place.parent)
    assert names("place") == ["a.txt", "b.py", "sub/a.txt", "sub/c.jsonl"]
    assert names("place/**/a.*") == ["place/a.txt", "place/sub/a.txt"]
    assert list_files("somebody/something") is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("./nowhere", "does not exist"),
        ("x.jsonl", "does not exist"),
        ("*.nothing", "no file"),
        ("empty", "no text files"),
    ],
)
def test_places_without_text(tmp_path, monkeypatch, text, wanted):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"`data` {text.replace('*', '.')}.* {wanted}"):
        list_files(text)


def test_order_follows_from_seed_and_names(place):
    files = list_files(str(place))
    orders = {seed: in_seeded_order(files, seed) for seed in range(6)}
    assert in_seeded_order(files[::-1], 3) == orders[3]
    assert len({tuple(order) for order in orders.values()}) > 1
    assert all(sorted(order) == [path for _, path in files] for order in orders.values())


def test_what_is_no_text_is_passed_over(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("café\n", encoding="utf-8")
    os.symlink(tmp_path / "gone", tmp_path / "c.txt")
    assert [list(read_texts(tmp_path / f"{name}.txt", "text")) for name in "abc"] == [[], ["café\n"], []]


def test_tables_read_alike(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1, "body": "one"}\n\n{"body": "", "n": 2}\n{"body": "two"}')
    pq.write_table(pa.table({"n": [1, 2, 3, 4], "body": ["one", "", "two", None]}), tmp_path / "a.parquet")
    assert list(read_texts(tmp_path / "a.jsonl", "body")) == ["one", "", "two"]
    assert list(read_texts(tmp_path / "a.parquet", "body")) == ["one", "", "two"]
    rows = list(read_field(tmp_path / "a.jsonl", "n"))
    assert [(where.rpartition("/")[2], value) for where, value, _ in rows] == [
        ("a.jsonl line 1", 1),
        ("a.jsonl line 3", 2),
        ("a.jsonl line 4", None),
    ]
    assert next(read_field(tmp_path / "a.parquet", "body"))[1:] == ("one", ["n", "body"])


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.jsonl", '{"text": "a"}\n{oops', "line 2 is not JSON"),
        ("a.jsonl", '{"body": "a"}', r"line 1 has no text field 'text' \(it has: body\): pass `text_field`"),
        ("a.jsonl", "[1]", r"line 1 has no text field 'text' \(it has: list\)"),
        ("a.parquet", "PAR1", "is not a readable parquet file"),
        ("a.parquet", {"body": ["a"]}, r"has no text field 'text' \(it has: body\): pass `text_field`"),
        ("a.parquet", {"text": [1]}, "row 1 has no text field 'text'"),
    ],
)
def test_bad_tables(tmp_path, name, content, wanted):
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} {wanted}"):
        list(read_texts(tmp_path / name, "text"))
