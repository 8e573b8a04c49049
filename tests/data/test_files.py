"""Files of a place, and texts of a file."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puzzle.base.errors import UserError
from puzzle.data.documents import Source, documents
from puzzle.data.files import NotText, in_seeded_order, list_files, read_field, read_texts


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
        ("a.csv", "is a .csv table, which is not read: convert it to .jsonl or .parquet"),
        ("*.TSV", "a .tsv table"),
        ("gone.ndjson", "does not exist"),
        ("gone.json.gz", "does not exist"),
    ],
)
def test_places_without_text(tmp_path, monkeypatch, text, wanted):
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "b.TSV"):
        (tmp_path / name).write_text("text\na\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"`data` {text.replace('*', '.+')}.* {wanted}"):
        list_files(text)


def test_order_follows_from_seed_and_names(place):
    files = list_files(str(place))
    orders = {seed: in_seeded_order(files, seed) for seed in range(6)}
    assert in_seeded_order(files[::-1], 3) == orders[3]
    assert len({tuple(order) for order in orders.values()}) > 1
    assert all(sorted(order) == [path for _, path in files] for order in orders.values())


def test_what_is_no_text_is_left_out_and_named(tmp_path, capsys):
    """Of a directory or glob, once however often it is read; a file that was named itself is an error."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("café\n", encoding="utf-8")
    os.symlink(tmp_path / "gone", tmp_path / "c.txt")
    for place in (tmp_path, tmp_path / "*.txt"):
        assert list(documents(Source(name="x", paths=(str(place),)), 0)) == ["café\n"]
    told = capsys.readouterr().err.replace("\n", " ")
    assert told.count("left out: ") == 1
    assert "a.txt is not UTF-8 text (byte 0xe9)" in told
    with pytest.raises(NotText, match=r"a\.txt is not UTF-8 text"):
        list(documents(Source(name="x", paths=(str(tmp_path / "a.txt"),)), 0))


ROWS = b'{"text": "one\\r\\n"}\n\n{"text": null}\n{"text": "t\xc3\xbco"}\n'


def as_list(rows: bytes) -> bytes:
    return json.dumps([json.loads(line) for line in rows.splitlines() if line]).encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", bytes),
        ("a.JSONL", bytes),
        ("a.ndjson", bytes),
        ("a.json", bytes),
        ("a.json", as_list),
        ("a.jsonl", codecs.BOM_UTF8.__add__),
        ("a.json", lambda rows: codecs.BOM_UTF8 + as_list(rows)),
        ("a.jsonl.gz", gzip.compress),
        ("a.json.GZ", lambda rows: gzip.compress(as_list(rows), mtime=0)),
        ("a.ndjson.bz2", bz2.compress),
        ("a.jsonl.xz", lzma.compress),
    ],
)
def test_rows_read_alike_whatever_the_file_is_called(tmp_path, name, write):
    """By name, by glob and, but for .json, in a directory."""
    (tmp_path / name).write_bytes(write(ROWS))
    for place in (tmp_path / name, tmp_path / "a.*", tmp_path):
        if place == tmp_path and ".json" in name.lower() and ".jsonl" not in name.lower():
            continue
        assert list(documents(Source(name="x", paths=(str(place),)), 0)) == ["one\r\n", "tüo"]


@pytest.mark.parametrize("module", ["compression.zstd", "zstandard"])
def test_zstd_through_what_there_is(tmp_path, monkeypatch, module):
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)

    def whole(path, mode):
        return io.BytesIO(pa.input_stream(str(path), compression="zstd").read())

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(open=whole, ZstdError=KeyError))
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as handle:
        handle.write(ROWS)
    assert list(read_texts(tmp_path / "a.jsonl.zst", "text")) == ["one\r\n", "tüo"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", codecs.BOM_UTF8 + "é\r\n".encode()), ("a.TXT.gz", gzip.compress("é\n".encode(), mtime=0))],
)
def test_texts_without_their_mark(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(documents(Source(name="x", paths=(str(tmp_path),)), 0)) == ["é\n"]


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
        ("a.parquet", {"text": [1]}, "row 1 has int in field 'text'"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}',
            r"line 2 is not UTF-8 \(byte 0xe9 at 14\): convert the file",
        ),
        ("a.jsonl", r'{"text": "\ud83d"}', r"line 1 has half a surrogate pair, '\\ud83d', in its text: mend or remove"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.json", '[{"text": "a"}, {"text": 5}]', "row 2 has int in field 'text'"),
        ("a.json", '{"name": "settings", "size": 3}', r"row 1 has no text field 'text' \(it has: name, size\)"),
        ("a.json", '[{"text": "a"},', "is not JSON"),
        ("a.json", b'[{"text": "caf\xe9"}]', r"is not UTF-8 text \(byte 0xe9\)"),
        ("a.jsonl.gz", "no gzip", r"cannot be read \(Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"cannot be read \(Compressed file ended"),
        ("a.jsonl.xz", "no xz", "cannot be read"),
        ("a.parquet.gz", "PAR1", "a .parquet file is compressed within; unpack it"),
        ("a.jsonl.zst", "x", r"needs zstandard: pip install zstandard, or unpack it \(`zstd -d`\)"),
        ("a.txt", b"caf\xe9", r"is not UTF-8 text \(byte 0xe9\): convert it"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, name, content, wanted):
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    if isinstance(content, dict):
        pq.write_table(pa.table(content), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"{name}:? {wanted}"):
        list(read_texts(tmp_path / name, "text"))
