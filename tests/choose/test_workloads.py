"""Further workloads that the same child must serve."""

from __future__ import annotations

import json

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_further_workloads_hold_too(puzzle, one_line_error, own_library):
    """The child meets the limits of every workload, each relative to the parent in that workload."""
    alone = json.loads(puzzle("solve", own_library, "--throughput", "1.2x", *SOLVE, "--json").stdout)
    also = ["--also", "16/8@1:ttft=70%", "--also", "16/4:throughput=1.3x"]
    done = puzzle("solve", own_library, "--throughput", "1.2x", *also, "--memory", "10MB", *SOLVE, "--json")
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    first, second = solved["also"]
    assert first["predicted"]["batch"] == 1
    assert first["predicted"]["ttft_seconds"] <= 0.7 * first["parent_predicted"]["ttft_seconds"]
    assert second["speedup"] >= 1.3
    assert second["predicted"]["batch"] == solved["predicted"]["batch"]
    assert solved["objective"] >= alone["objective"]
    assert {"throughput", "memory", "ttft@16/8@1", "memory@16/8@1", "throughput@16/4"} <= set(solved["slack"])
    shown = puzzle("solve", own_library, "--throughput", "1.2x", *also, *SOLVE)
    assert "also 16/8 at batch 1, predicted:" in shown.output
    far = puzzle("solve", own_library, "--also", "16/8@1:throughput=1000x", *SOLVE)
    one_line_error(far, "--also 16/8@1:throughput 1000x cannot be met: the fastest child reaches")
