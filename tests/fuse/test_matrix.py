"""dependency.json and its picture."""

from __future__ import annotations

import json
import sys

import pytest

from puzzle.base.errors import UserError
from puzzle.fuse.matrix import Dependency, Matrix, draw_heat_map, read_dependency


def test_file_and_picture(tmp_path, monkeypatch):
    matrix = Matrix(dependency=[[None, 0.25], [None, None]], relative_error=[[None, 0.5], [None, None]])
    path = tmp_path / "dependency.json"
    value = {"schema": 1, **Dependency(layers=matrix, ffns=None, facts={"model": "m"}).to_json()}
    path.write_text(json.dumps(value))
    found = read_dependency(path, 2)
    assert found == Dependency(layers=matrix, ffns=None, facts={"model": "m"})
    with pytest.raises(UserError, match="a model with 2 layers, this one has 3"):
        read_dependency(path, 3)
    for broken, wanted in (
        ({**value, "layers": {"dependency": [[1]]}}, "no dependency matrix in 'layers'"),
        ({**value, "layers": {"dependency": [[1, 2]], "relative_error": [[1]]}}, "it is not square"),
        ({**value, "layers": None}, "holds no dependency matrix"),
        ({**value, "schema": 7}, "has schema 7"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=wanted):
            read_dependency(path, 2)
    draw_heat_map(tmp_path / "map.png", matrix, "two layers")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"puzzle-nas\[report\]"):
        draw_heat_map(tmp_path / "map.png", matrix, "two layers")
