"""Building and healing by number of processes, rehearsed on a CPU."""

from __future__ import annotations

import csv

import pytest
from click.testing import CliRunner

import rank_tables
from timed_puzzle import read_timed


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("speed/bench_ranks.py")


def test_one_and_two_processes(script, parent, child, corpus, tmp_path):
    """A row for each stage and number; two processes find what one finds."""
    path = tmp_path / "x.csv"
    given = [tmp_path / "work", "--parent", parent, "--child", child, "--data", corpus, "--small", "--csv", path]
    for more in (["--ranks", "1"], ["--ranks", "2", "--append"]):
        done = CliRunner().invoke(script.main, [str(a) for a in (*given, *more)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    with open(path, newline="") as handle:
        rows = {(r["stage"], r["ranks"]): r for r in csv.DictReader(handle)}
    assert list(rows) == [(stage, n) for n in ("1", "2") for stage in ("build", "score", "heal")]
    for stage in ("build", "score", "heal"):
        one, two = rows[stage, "1"], rows[stage, "2"]
        assert one["times_of_one"] == "1.000"
        speeds = [float(r["tokens_per_second"]) for r in (two, one)]
        assert float(two["times_of_one"]) == pytest.approx(speeds[0] / speeds[1], rel=0.05, abs=1e-3)
        assert one["num_tokens"] == two["num_tokens"]
        assert float(one["kl"]) == pytest.approx(float(two["kl"]), rel=1e-3)
    assert float(rows["heal", "1"]["kl"]) < float(rows["heal", "1"]["kl_before"])
    assert rank_tables.ranks(list(rows.values())).count("\n") == 1 + len(rows)


def test_a_failure_says_why(script):
    with pytest.raises(RuntimeError, match="heal on 1: error: Missing option '--out'"):
        script.launched(1, "cpu", "heal", "nothing")


def test_seconds_of_a_stage_are_those_of_all_its_calls():
    assert read_timed("x\nTIMED build 1.250\nTIMED score 3.000\nTIMED build 2.000\n") == {"build": 3.25, "score": 3.0}
