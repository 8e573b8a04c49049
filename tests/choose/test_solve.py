"""The answer: optimum, baselines, prices, and children that differ."""

from __future__ import annotations

import json

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_baselines_explanations_and_relative_goals(puzzle, one_line_error, own_library, tmp_path):
    goal = ["--throughput", "1.2x", "--memory", "95%", *SOLVE, "--out", tmp_path / "s", "--json"]
    best = json.loads(puzzle("solve", own_library, *goal, "--explain").stdout)
    assert {p["limit"] for p in best["prices"]} == {"throughput", "memory"}
    assert all(p["objective"] <= best["objective"] for p in best["prices"])
    for rule in ("greedy", "uniform", "random", "no-op", "most-parameters"):
        done = puzzle("solve", own_library, *goal, "--baseline", rule)
        if done.exit_code == 0:
            assert json.loads(done.stdout)["objective"] >= best["objective"] - 1e-12
        else:
            one_line_error(done, f"--baseline {rule} finds no child")


def test_diverse_children_differ(puzzle, own_library, tmp_path):
    out = tmp_path / "d"
    goal = ["--throughput", "1.2x", "--diverse", 3, "--min-distance", 2, *SOLVE, "--out", out, "--json"]
    found = json.loads(puzzle("solve", own_library, *goal).stdout)["solutions"]
    assert [s["objective"] for s in found] == sorted(s["objective"] for s in found)
    for n, one in enumerate(found):
        for other in found[:n]:
            assert sum(a != b for a, b in zip(one["layers"], other["layers"], strict=True)) >= 2
    assert len(list(out.glob("architecture-*.json"))) == len(found)
