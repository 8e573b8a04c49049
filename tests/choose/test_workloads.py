"""Further workloads that the same child must serve."""

from __future__ import annotations

import json

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.choose.goal import LIMITS, Target
from puzzle.choose.workloads import ALSO_LIMITS, parse_also

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


def test_text_of_a_workload():
    found = parse_also(" 1024/64@8:ttft=300ms, throughput=1.5x")
    assert (found.work, found.batch, found.name) == (Workload(input_len=1024, output_len=64), 8, "1024/64@8")
    assert found.goal.limits == {
        "ttft": Target(value=0.3, relative=False),
        "throughput": Target(value=1.5, relative=True),
    }
    assert (parse_also("16/8:latency=1s").batch, parse_also("16/8:latency=1s").name) == (None, "16/8")
    assert tuple(li.option for li in LIMITS if li.option not in ("memory", "params", "active_params")) == ALSO_LIMITS


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("32:ttft=1s", "write INPUT/OUTPUT"),
        ("32/8", "write INPUT/OUTPUT"),
        ("32/8:", "write INPUT/OUTPUT"),
        ("32/8@x:ttft=1s", "write INPUT/OUTPUT"),
        ("32/8:ttft", "'ttft' is no new limit"),
        ("32/8:memory=1GB", "'memory=1GB' is no new limit"),
        ("32/8:ttft=1s,ttft=2s", "'ttft=2s' is no new limit"),
        ("32/8:ttft=soon", "`ttft` soon: write seconds"),
        ("0/8:ttft=1s", "`input_len` 0: a workload has at least 1 token"),
        ("8/0:ttft=1s", "`output_len` 0: a workload has at least 1 token"),
        ("32/8@0:ttft=1s", "a batch of 0 sequences"),
    ],
)
def test_bad_workloads_name_the_text(text, wanted):
    with pytest.raises(UserError) as caught:
        parse_also(text)
    assert str(caught.value).startswith(f"`also` {text}: ")
    assert wanted in str(caught.value)
