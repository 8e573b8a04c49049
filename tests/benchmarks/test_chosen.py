"""The table of chosen children is made of what is kept, with nothing run again."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner

from results_page import BENCHMARKS

RECIPE = BENCHMARKS.parent / "examples" / "smollm2_h100.yaml"


def test_the_table_of_all_lanes_runs_nothing(tmp_path: Path, load_script, monkeypatch: pytest.MonkeyPatch):
    script = load_script("quality/bench_chosen.py")

    def row(_: object, speed: float, method: str) -> dict[str, object] | None:
        return None if method == "greedy" else {"speed": speed, "method": method, "kl": 0.5}

    def run(*_: object, **__: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(script.Bench, "row", row)
    monkeypatch.setattr(script.subprocess, "run", run)
    out = tmp_path / "chosen.csv"
    asked = ["table", "--parent", "parent", "--data", "text", "--work", str(tmp_path), "--out", str(out)]
    done = CliRunner().invoke(script.main, [str(RECIPE), *asked, "--speeds", "1.5,2", "--methods", "mip,greedy,random"])
    assert done.exit_code == 0, done.output
    with open(out, newline="", encoding="utf-8") as handle:
        found = [(float(one["speed"]), one["method"]) for one in csv.DictReader(handle)]
    assert found == [(speed, method) for speed in (1.5, 2.0) for method in ("mip", "random", "steps")]
