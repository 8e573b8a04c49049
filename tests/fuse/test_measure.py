"""The dependency matrix and blocks in parallel against naive twins; dependency.json and its picture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from puzzle.export.walker import Walker
from puzzle.fuse.measure import measure_dependency, parallel_divergence, parallel_report
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import load_model

IDS = torch.randint(2, 384, (5, 21), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def walker(fusible):
    from puzzle.export.sources import child_of_checkpoint

    opened = open_model(fusible)
    return Walker(child_of_checkpoint(opened), IDS, torch.device("cpu"), torch.float32)


def contributions(model, kind: str, without: int | None) -> list[torch.Tensor]:
    """What every layer (or its FFN) adds, with the contribution of one of them left out."""
    x, ropes, found = model.embed(IDS), model.ropes(IDS.shape[1]), []
    for index, block in enumerate(model.blocks):
        attention = block.attention(x, ropes)
        ffn = block.ffn(x + attention, ropes)
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
    ropes = model.ropes(IDS.shape[1])

    def added(block, x):
        return block(x, ropes) - x

    def run(pairs):
        x, index = model.embed(IDS), 0
        while index < len(model.blocks):
            if index in pairs:
                x = x + added(model.blocks[index], x) + added(model.blocks[index + 1], x)
                index += 2
            else:
                x = model.blocks[index](x, ropes)
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
