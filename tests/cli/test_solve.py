"""`puzzle solve` on the tiny parent: goals met, limits together, bad goals."""

from __future__ import annotations

import json

import pytest

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


@pytest.mark.parametrize("backend", ["ortools", "pulp"])
def test_solve_meets_the_goal(puzzle, own_library, backend):
    done = puzzle("solve", own_library, "--throughput", "1.7x", *SOLVE, "--backend", backend, "--json")
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    assert solved["status"] == "optimal"
    assert solved["speedup"] >= 1.7
    assert solved["slack"]["throughput"] >= 0
    assert solved["objective"] == pytest.approx(solved["bound"])
    assert json.loads((own_library / "solution/architecture.json").read_text())["layers"] == solved["layers"]
    if backend == "pulp":
        other = json.loads(puzzle("solve", own_library, "--throughput", "1.7x", *SOLVE, "--json").stdout)
        assert other["objective"] == pytest.approx(solved["objective"], rel=1e-9)


def test_limits_hold_together(puzzle, own_library):
    done = puzzle(
        "solve", own_library, "--throughput", "1.2x", "--memory", "150000", "--params", "30000", *SOLVE, "--json"
    )
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    assert solved["predicted"]["memory_bytes"] <= 150000
    assert solved["predicted"]["num_parameters"] <= 30000
    assert set(solved["slack"]) == {"throughput", "memory", "params"}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--throughput", "0x"], ["--throughput 0x", "above 0"]),
        (["--throughput", "-1x"], ["--throughput -1x", "above 0"]),
        (["--throughput", "fast"], ["--throughput fast", "such as 2x"]),
        (["--throughput", "nanx"], ["--throughput nanx"]),
        (["--latency", "0"], ["--latency 0", "above 0"]),
        (["--memory", "-3GB"], ["--memory '-3GB' is no amount of memory"]),
        (["--params", "few"], ["--params few"]),
        ([], ["no goal"]),
        (["--throughput", "2x", "--input-len", "0"], ["--input-len 0"]),
        (["--throughput", "2x", "--output-len", "9999"], ["exceed the parent's context of 256"]),
        (["--throughput", "2x", "--input-len", "100"], ["prompts of 16 to 16 tokens", "profile again", "--prefill"]),
        (["--memory", "1kB"], ["--memory 1000 bytes (1000 B) cannot be met", "smallest child"]),
        (["--params", "10"], ["--params 10 cannot be met", "smallest child"]),
        (["--latency", "1e-9"], ["--latency 1e-09 s cannot be met", "fastest child"]),
        (["--throughput", "2x", "--time-limit", "-1"], ["--time-limit -1"]),
        (["--memory", "0%"], ["--memory 0%", "above 0"]),
        (["--cached-tokens", "1M"], ["--cached-tokens needs --memory"]),
        (["--keep-attention", "99"], ["--keep-attention 99 cannot be met", "at most 4 layers"]),
        (["--throughput", "1x", "--pin", "3-9"], ["--pin 3-9", "outside the parent's layers 0-3"]),
        (["--throughput", "1x", "--stages", "9"], ["9 stages of 4 layers"]),
        (["--throughput", "1x", "--diverse", "2", "--min-distance", "9"], ["distance of 9 layers"]),
        (["--also", "32:ttft=1s"], ["--also 32:ttft=1s", "1024/64@8"]),
        (["--also", "32/8:ttft=1s,ttft=2s"], ["'ttft=2s' is no new limit"]),
        (["--also", "32/8:beauty=2x"], ["'beauty=2x'", "throughput, latency, ttft, tpot"]),
        (["--also", "32/8:ttft=-1s"], ["--ttft -1s", "above 0"]),
        (["--also", "32/8@5:ttft=1s"], ["batch 5 is not in the costs"]),
        (["--pareto", "beauty"], ["--pareto beauty", "throughput, latency, memory"]),
        (["--pareto", "memory", "--points", "1"], ["--points 1"]),
    ],
)
def test_bad_goals(puzzle, one_line_error, own_library, arguments, wanted):
    lengths = [] if any("len" in str(a) for a in arguments) else ["--input-len", 16, "--output-len", 16]
    one_line_error(puzzle("solve", own_library, "--gpu", "cpu", *lengths, *arguments), *wanted)
    assert not (own_library / "solution").exists()
