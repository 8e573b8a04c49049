"""A table that several measurements add to, and one that is cut off and goes on."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor

from click.testing import CliRunner

from point_table import PointTable


def test_processes_that_share_a_table_keep_each_other_s_rows(tmp_path):
    path = tmp_path / "x.csv"
    tables = [PointTable(path, "lane,step,steps", ("lane", "step"), append=True, writes=True, fill=count, shared=True)
              for _ in range(4)]  # fmt: skip

    def lane(number: int) -> None:
        for step in range(20):
            tables[number].add({"lane": str(number), "step": str(step), "steps": ""})

    with ThreadPoolExecutor() as pool:
        list(pool.map(lane, range(4)))
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert {(row["lane"], row["step"]) for row in rows} == {(str(n), str(s)) for n in range(4) for s in range(20)}
    assert {row["steps"] for row in rows} == {"80"}
    assert tables[0].has(lane="0", step="7")
    assert not tables[0].has(lane="0", step="20")


def count(rows) -> None:
    for row in rows:
        row["steps"] = str(len(rows))


def test_what_was_measured_is_not_measured_again(load_script, monkeypatch, tmp_path):
    script, path = load_script("speed/bench_fusion_latency.py"), tmp_path / "x.csv"
    small = ["--device", "cpu", "--shapes", "reference", "--context", "16", "--fractions", "1", "--csv", str(path)]
    seen = []

    def measured(model, batch, *more):
        seen.append((model.structure.num_layers, batch))
        return [1.0, 2.0, 3.0]

    monkeypatch.setattr(script, "measure", measured)
    for batches in ("1", "1,2"):
        told = [*small, "--batches", batches, "--go-on"]
        assert CliRunner().invoke(script.main, told, catch_exceptions=False).exit_code == 0
    assert seen == [(layers, batch) for batch in (1, 2) for layers in (16, 16, 12, 10, 9)]
    with open(path, newline="", encoding="utf-8") as handle:
        assert len(list(csv.DictReader(handle))) == 10
