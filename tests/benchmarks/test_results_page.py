"""docs/results.md is what the files in benchmarks/results say, and every one of them has its section and its command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import result_tables
import results_page
from results_page import BENCHMARKS, PAGE, SECTIONS, commands, docstring

RESULTS = [result for results in SECTIONS.values() for result in results]
SCRIPTS = sorted(
    path.relative_to(BENCHMARKS)
    for folder in ("kernels", "quality", "serving", "solver", "speed")
    for path in (BENCHMARKS / folder).iterdir()
    if path.suffix in (".py", ".sh")
)


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == results_page.page(), "run `make results`"


def test_every_file_has_a_section():
    assert sorted(r.file for r in RESULTS) == sorted(path.name for path in (BENCHMARKS / "results").iterdir())


@pytest.mark.parametrize("result", RESULTS, ids=lambda r: r.file)
def test_a_command_names_the_file(result):
    where = result.command_in or result.script
    assert result.command or commands(docstring(where), result.file)
    assert result.picture is None or (PAGE.parent / result.picture).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_says_how_it_is_run(script: Path):
    """Its own path stands in the docstring, and no path there leads nowhere."""
    said = docstring(str(script))
    assert f"benchmarks/{script}" in said
    for name in re.findall(r"benchmarks/\w+/\w+\.(?:py|sh)", said):
        assert (BENCHMARKS.parent / name).is_file(), name


def test_figures_of_bench_are_read_as_it_writes_them_today():
    value = json.loads((BENCHMARKS / "results" / "bench_latency.json").read_text(encoding="utf-8"))
    before = result_tables.bench(value)
    value["precision"] = {"bfloat16": "bf16"}[value.pop("dtype")]
    assert result_tables.bench(value) == before.replace("bfloat16", "bf16")


def test_halves_are_rounded_up():
    number, percent = result_tables.number, result_tables.percent
    assert [number("2.125", 2), number("1234567", 0), percent("0.0125"), percent("0.5", 0)] == [
        "2.13", "1,234,567", "1.3 %", "50 %",
    ]  # fmt: skip
