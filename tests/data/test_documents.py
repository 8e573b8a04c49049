"""Documents: which are held out, and where they come from."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from puzzle.base.errors import UserError
from puzzle.data.documents import Source, documents, is_held_out, text_key


def source(*paths: object) -> Source:
    return Source(name="x", paths=tuple(str(path) for path in paths))


def test_two_in_a_hundred_are_held_out_for_good(texts):
    assert sum(is_held_out(text_key(f"text {i}")) for i in range(20_000)) == 394
    assert [i for i, text in enumerate(texts) if is_held_out(text_key(text))] == [24, 42, 45, 96, 107, 117, 182, 185]


def test_places_add_up_in_one_order(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(6):
            (tmp_path / folder / f"{folder}{number}.txt").write_text(f"{folder}{number}")
    one = list(documents(source(tmp_path / "a", tmp_path / "b"), 0))
    assert one == list(documents(source(tmp_path / "b", tmp_path / "a"), 0))
    assert sorted(one) == [f"{folder}{number}" for folder in "ab" for number in range(6)]
    assert one != list(documents(source(tmp_path / "a", tmp_path / "b"), 1))


def test_datasets_come_before_files(tmp_path, monkeypatch):
    def load_dataset(name, split, streaming):
        if name == "some/where":
            raise OSError("no such dataset\non the hub")
        return iter([{"text" if name == "some/texts" else "body": "from the hub"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    (tmp_path / "a.txt").write_text("from a file")
    assert list(documents(source(tmp_path, "some/texts"), 0)) == ["from the hub", "from a file"]
    with pytest.raises(UserError, match=r"dataset some/bodies has no text field 'text' \(it has: body\)"):
        list(documents(source("some/bodies"), 0))
    with pytest.raises(UserError, match=r"`data` some/where is neither a file here nor .* \(no such dataset\)"):
        list(documents(source("some/where"), 0))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'puzzle-nas\[heal\]'"):
        list(documents(source("some/texts"), 0))
    with pytest.raises(UserError, match="no data: pass `data`"):
        list(documents(source(), 0))
