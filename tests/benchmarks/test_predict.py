"""Predicted decode steps and prefills that are published are those of the shipped tables."""

from __future__ import annotations

import csv

import pytest
from click.testing import CliRunner

from results_page import BENCHMARKS

H200 = ("nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("predict", ["--gpu", "h100"]),
        ("predict_fp8", ["--gpu", "h100", "--fp8"]),
        *((f"predict_{shapes}", ["--gpu", "h200", "--shapes", shapes, "--count", "8"]) for shapes in H200),
    ],
)
def test_published_predictions_are_those_of_the_shipped_tables(load_script, tmp_path, name, options):
    """A table that is measured again, or another rule, changes them."""
    script, published = load_script("speed/bench_predict.py"), BENCHMARKS / "results" / f"{name}.csv"
    given = ["--measured", str(published), "--out", str(tmp_path / "x.csv"), *options]
    assert CliRunner().invoke(script.main, given, catch_exceptions=False).exit_code == 0
    found, kept = ([*csv.DictReader(p.read_text().splitlines())] for p in (tmp_path / "x.csv", published))
    assert [float(row["predicted_s"]) for row in found] == pytest.approx(
        [float(row["predicted_s"]) for row in kept], rel=1e-5
    )
