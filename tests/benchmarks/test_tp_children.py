"""Children of GPUs that share a model, rehearsed: solved by made-up prices, measured on two processes of a CPU."""

from __future__ import annotations

import csv

import pytest
from click.testing import CliRunner, Result

import rank_tables
from results_page import BENCHMARKS

SCRIPT = BENCHMARKS / "speed" / "bench_tp_children.py"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("speed/bench_tp_children.py")


def run(script, *arguments: object) -> Result:
    """Without torchrun, where it is to succeed: a failure ends its process."""
    return CliRunner().invoke(script.main, [str(a) for a in arguments])


def test_solved_then_measured(script, torchrun, tmp_path):
    small = (tmp_path / "work", "--tp", 2, "--small")
    done = run(script, *small, "--goals", "75%,0.01%")  # of which one cannot be reached
    assert done.exit_code == 0, (done.output, done.exception)
    path = tmp_path / "x.csv"
    for code, _, told in torchrun(2, SCRIPT, *small, "--goals", "75%,0.01%", "--csv", path):
        assert code == 0, told
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * 5
    assert {(r["model"], r["goal"]) for r in rows} == {("parent", ""), ("child", "latency 75%")}
    assert all(float(r["measured"]) > 0 for r in rows)
    assert "| cpu | reference | latency 75% |" in rank_tables.tp_children(rows)
    assert {(r["promised"], r["costs_device"], r["device"]) for r in rows} == {("", "2 x a GPU", "cpu")}


def test_nothing_to_measure(torchrun, tmp_path):
    for code, _, told in torchrun(2, SCRIPT, tmp_path, "--tp", 2, "--small", "--csv", tmp_path / "x.csv"):
        assert code == 1
        assert "has no children: run this without torchrun first" in told
    ((code, _, told),) = torchrun(1, SCRIPT, tmp_path, "--tp", 2, "--small", "--goals", "0.01%")
    assert (code, "no goal was reached" in told) == (1, True)


def test_rows_hold_promises_beside_what_was_measured(script, tmp_path):
    from puzzle.measure.architecture import read_architecture

    assert run(script, tmp_path, "--tp", 2, "--small", "--goals", "66%").exit_code == 0
    solved = read_architecture(script.folder(tmp_path, "66%"))
    told = solved.predicted
    measured = {
        "batch": 4, "ttft_seconds": 2 * told.ttft_seconds, "decode_seconds": told.latency_seconds, "tpot_seconds": 1.0,
        "tokens_per_second": told.tokens_per_second, "memory_bytes": told.memory_bytes,
    }  # fmt: skip
    found = {"tp": 2, "workload": {"input_len": 16, "output_len": 8}, "precision": "bf16", "device": "2 x a GPU"}
    rows = list(
        script.rows_of("reference", "66%", solved, found | {"child": {"measured": measured, "predicted": {}}}, "")
    )
    ratios = {row["quantity"]: float(row["measured_over_promised"]) for row in rows}
    assert ratios["ttft_seconds"] == 2
    assert ratios["memory_bytes"] == ratios["tokens_per_second"] == 1
    assert ratios["latency_seconds"] == pytest.approx(1 + 2 * told.ttft_seconds / told.latency_seconds, abs=1e-4)
