"""The benchmark of fused layers at tiny size, its rows beside those of another card, and their promise."""

from __future__ import annotations

import csv

import pytest
from click.testing import CliRunner

import result_tables
from results_page import BENCHMARKS


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("speed/bench_fusion_latency.py")


def read(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_rows_are_added_to_those_of_other_cards(script, tmp_path):
    path = tmp_path / "x.csv"
    small = ["--device", "cpu", "--shapes", "reference", "--batches", "1", "--context", "16", "--steps", "2"]
    told = [*small, "--fractions", "1", "--csv", str(path), "--append"]
    assert CliRunner().invoke(script.main, told, catch_exceptions=False).exit_code == 0
    rows = read(path)
    assert [row["fusion"] for row in rows] == ["parent", "unfused", "twos", "fours", "one"]
    assert [row["num_layers"] for row in rows] == ["16", "16", "12", "10", "9"]
    path.write_text(path.read_text().replace(",cpu,", ",another card,"))
    assert CliRunner().invoke(script.main, told, catch_exceptions=False).exit_code == 0
    rows = read(path)
    assert [row["device"] for row in rows] == ["another card"] * 5 + ["cpu"] * 5
    lines = result_tables.fusion_latency(rows).splitlines()[-2:]
    assert [line.split(" | ")[1] for line in lines] == ["1 x another card", "1 x cpu"]
    for line, own in zip(lines, (rows[:5], rows[5:]), strict=True):
        assert [row["speedup_over_unfused"] for row in own[2:]] == line.split(" | ")[5:8]


def test_promises_are_of_the_table_of_the_row_s_own_card(load_script, tmp_path):
    """Of an H200 without a table they come from the H100's, times the ratio of bandwidths."""
    script = load_script("speed/bench_tp_promise.py")
    measured, out = BENCHMARKS / "results" / "fusion_latency_8xh200.csv", tmp_path / "x.csv"
    given = ["--measured", str(measured), "--csv", str(out)]
    assert CliRunner().invoke(script.main, given, catch_exceptions=False).exit_code == 0
    first = read(out)
    assert {row["table_of"] for row in first} == {"NVIDIA H100 80GB HBM3 times 0.698"}
    shipped = script.PACKAGED / "h100-sxm-80gb" / "llama-3.1-405b-tp8.csv"
    own = tmp_path / "costs" / "h200" / shipped.name
    own.parent.mkdir(parents=True)
    own.write_text(shipped.read_text().replace("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
    given += ["--costs", str(tmp_path / "costs")]
    assert CliRunner().invoke(script.main, given, catch_exceptions=False).exit_code == 0
    second = read(out)
    assert {row["table_of"] for row in second} == {"NVIDIA H200"}
    assert float(second[0]["promised_s"]) > float(first[0]["promised_s"])


def test_published_promises_are_those_of_the_shipped_tables(load_script, tmp_path):
    """Costs and sums that are measured later, or another rule, change them."""
    script, results, out = load_script("speed/bench_tp_promise.py"), BENCHMARKS / "results", tmp_path / "x.csv"
    measured = [results / "fusion_latency.csv", results / "fusion_latency_8xh200.csv"]
    given = [word for path in measured for word in ("--measured", str(path))] + ["--csv", str(out)]
    assert CliRunner().invoke(script.main, given, catch_exceptions=False).exit_code == 0
    found, published = read(out), read(results / "tp_promise.csv")
    for name in ("promised_s", "measured_over_promised"):
        assert [float(row.pop(name)) for row in found] == pytest.approx(
            [float(row.pop(name)) for row in published], rel=2e-4
        )
    assert found == published
