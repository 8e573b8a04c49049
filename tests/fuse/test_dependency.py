"""The dependency matrix and blocks in parallel against naive twins; dependency.json and its picture."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from puzzle.base.errors import UserError
from puzzle.fuse.matrix import Dependency, Matrix, draw_heat_map, read_dependency
from puzzle.fuse.measure import Walker, measure_dependency, parallel_divergence, parallel_report
from puzzle.parents.family import open_model
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import load_model

IDS = torch.randint(2, 384, (5, 21), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def walker(fusible):
    from puzzle.export.sources import child_of_checkpoint

    opened = open_model(fusible)
    return Walker(child_of_checkpoint(opened), opened.spec, IDS, torch.device("cpu"), torch.float32)


def contributions(model, kind: str, without: int | None) -> list[torch.Tensor]:
    """What every layer (or its FFN) adds, with the contribution of one of them left out."""
    x, rope, found = model.embedding(IDS), model.rope(IDS.shape[1]), []
    for index, block in enumerate(model.blocks):
        attention = block.attention(x, rope)
        ffn = block.ffn(x + attention, rope)
        found.append(attention + ffn if kind == "layers" else ffn)
        if index != without:
            x = x + attention + ffn
        elif kind == "ffns":
            x = x + attention
    return found


@torch.no_grad()
def test_matrix_equals_its_naive_twin(walker, fusible):
    model = load_model(fusible)
    count = len(model.blocks)
    layers, ffns = measure_dependency(walker, ffns=True)
    for kind, matrix in (("layers", layers), ("ffns", ffns)):
        own = contributions(model, kind, None)
        for i in range(count):
            changed = contributions(model, kind, i)
            for j in range(count):
                distance, error = matrix.dependency[i][j], matrix.relative_error[i][j]
                if j <= i or not own[j].any() or not own[i].any():
                    assert distance is None
                    assert error is None
                    continue
                expected = (1 - F.cosine_similarity(own[j], changed[j], dim=-1)).mean().item()
                assert distance == pytest.approx(expected, abs=2e-6)
                size = (changed[j] - own[j]).pow(2).sum() / own[j].pow(2).sum()
                assert error == pytest.approx(size.item(), rel=1e-4, abs=1e-9)
    assert layers.dependency[1][2] > 0
    assert measure_dependency(walker)[1] is None


@torch.no_grad()
def test_blocks_in_parallel_equal_their_naive_twin(walker, fusible):
    model = load_model(fusible)
    rope = model.rope(IDS.shape[1])

    def added(block, x):
        return block(x, rope) - x

    def run(pairs):
        x, index = model.embedding(IDS), 0
        while index < len(model.blocks):
            if index in pairs:
                x = x + added(model.blocks[index], x) + added(model.blocks[index + 1], x)
                index += 2
            else:
                x = model.blocks[index](x, rope)
                index += 1
        return x

    sets = [[0], [9], [3, 7], []]
    for pairs, found in zip(sets, parallel_divergence(walker, sets), strict=True):
        meter = Divergence()
        meter.add(model, run([]), model, run(pairs), IDS)
        assert found["kl"] == pytest.approx(meter.result()["kl"], rel=1e-3, abs=1e-6)
    report = parallel_report(walker)
    assert [row["layers"] for row in report["pairs"]] == [[i, i + 1] for i in range(10) if i not in (5, 6)]
    for row in report["together"]:
        inside = [layer for pair in row["pairs"] for layer in pair]
        assert len(inside) == len(set(inside))
    assert report["together"][0]["kl"] == pytest.approx(min(row["kl"] for row in report["pairs"]), rel=1e-6)


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
