"""`puzzle evaluate` on the tiny parent and a child."""

from __future__ import annotations

import json

import pytest

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_evaluate_measures_both(puzzle, own_library, parent, corpus, tmp_path):
    puzzle("solve", own_library, "--throughput", "1.5x", *SOLVE)
    puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child")
    done = puzzle(
        "evaluate",
        parent,
        tmp_path / "child",
        "--data",
        corpus,
        "--sequences",
        4,
        "--seq-len",
        64,
        "--input-len",
        8,
        "--output-len",
        4,
        "--repeats",
        1,
        "--json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["child"]["kl"] > 0
    assert 0 <= found["child"]["top1_agreement"] <= 1
    assert found["child"]["num_parameters"] < found["parent"]["num_parameters"]
    assert found["speedup"] > 0
    same = json.loads(
        puzzle("evaluate", parent, parent, "--data", corpus, "--sequences", 4, "--no-speed", "--json").stdout
    )
    assert same["child"]["kl"] == pytest.approx(0, abs=1e-9)
    assert same["child"]["top1_agreement"] == 1
