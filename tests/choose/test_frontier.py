"""The Pareto frontier of the tiny library."""

from __future__ import annotations

import json

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_frontier_is_monotone_and_resumes(puzzle, own_library, tmp_path):
    arguments = [
        "solve",
        own_library,
        "--pareto",
        "throughput",
        "--points",
        6,
        *SOLVE,
        "--out",
        tmp_path / "f",
        "--json",
    ]
    points = json.loads(puzzle(*arguments).stdout)["points"]
    scores = [float(p["score"]) for p in points]
    assert len(points) >= 5
    assert scores == sorted(scores)
    path = tmp_path / "f" / "frontier.csv"
    kept = path.read_text()
    path.write_text("".join(kept.splitlines(keepends=True)[:3]))
    assert json.loads(puzzle(*arguments).stdout)["points"] == points
    assert sorted(path.read_text().splitlines()) == sorted(kept.splitlines())
    assert "●" in puzzle(*arguments[:-1]).output
