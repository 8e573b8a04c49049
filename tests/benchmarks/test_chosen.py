"""The table of chosen children is made of what is kept, with nothing run again; GPUs that share the work take what no other is at."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from puzzle import __version__
from results_page import BENCHMARKS

RECIPE = BENCHMARKS.parent / "examples" / "smollm2_h100.yaml"


def test_the_table_of_all_lanes_runs_nothing(tmp_path: Path, load_script, monkeypatch: pytest.MonkeyPatch):
    script = load_script("quality/bench_chosen.py")

    def row(_: object, speed: float, method: str) -> dict[str, object] | None:
        return None if method == "greedy" else {"speed": speed, "method": method, "kl": 0.5}

    def run(*_: object, **__: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr(script.Bench, "row", row)
    for how in ("whole_puzzle", "run_puzzle"):
        monkeypatch.setattr(script, how, run)
    out, earlier = (
        tmp_path / "chosen.csv",
        tmp_path / "chosen" / "uniform-width-1.25.json",
    )  # of a call for another speed
    earlier.parent.mkdir()
    earlier.touch()
    asked = ["table", "--parent", "parent", "--data", "text", "--work", str(tmp_path), "--out", str(out)]
    done = CliRunner().invoke(script.main, [str(RECIPE), *asked, "--speeds", "1.5,2", "--methods", "mip,greedy,random"])
    assert done.exit_code == 0, done.output
    with open(out, newline="", encoding="utf-8") as handle:
        found = [(float(one["speed"]), one["method"]) for one in csv.DictReader(handle)]
    assert found == [(speed, method) for speed in (1.25, 1.5, 2.0) for method in ("mip", "random", "steps")]


def test_one_waits_for_another(tmp_path: Path, load_script, monkeypatch: pytest.MonkeyPatch):
    script, ran = load_script("quality/bench_chosen.py"), list[str]()
    one, other = (script.Bench({"parent": "p"}, tmp_path, (), 1, 60, 1) for _ in range(2))

    def run(words: list[str], seconds: float) -> str:
        ran.append(words[0])
        with pytest.raises(script.Waits) as waits:  # asked while the first one is at it
            other.once("heal/a", "heal")
        assert waits.value.held
        with pytest.raises(script.Waits) as waits:
            other.need("heal/a")
        assert waits.value.held
        return json.dumps({"kl": 1})

    with pytest.raises(script.Waits) as waits:
        other.need("heal/a")
    assert not waits.value.held
    monkeypatch.setattr(script, "run_puzzle", run)
    assert one.once("heal/a", "heal") == other.once("heal/a", "heal")
    other.need("heal/a")
    assert ran == ["heal"]


def test_what_fails_leaves_the_rest(tmp_path: Path, load_script, monkeypatch: pytest.MonkeyPatch):
    script, ran = load_script("quality/bench_chosen.py"), list[str]()

    def choose(bench: Any, speed: float, method: str, flags: object) -> None:
        ran.append(method)
        if method == "mip":
            raise script.subprocess.CalledProcessError(2, "solve")

    def heal(bench: Any, speed: float, method: str) -> None:
        if method == "mip":
            bench.need("chosen/mip-1.5")

    monkeypatch.setattr(script.Bench, "choose", choose)
    monkeypatch.setattr(script.Bench, "heal", heal)
    asked = ["choose", "heal", "--data", "text", "--work", str(tmp_path), "--out", str(tmp_path / "chosen.csv")]
    done = CliRunner().invoke(script.main, [str(RECIPE), *asked, "--speeds", "1.5", "--methods", "mip,greedy"])
    assert done.exit_code == 1
    assert "choose 1.5 mip: exit 2; heal 1.5 mip: what it needs is not there" in done.output
    assert ran == ["mip", "greedy"]


def test_a_fork_does_what_the_command_does(load_script):
    """It prints what the command prints, fails as it fails, and ends when its time does."""
    script = load_script("quality/bench_chosen.py")
    assert (
        script.run_puzzle(["--version"], 120)
        == script.whole_puzzle(["--version"], 120)
        == f"puzzle, version {__version__}\n"
    )
    for run in (script.run_puzzle, script.whole_puzzle):
        with pytest.raises(subprocess.CalledProcessError) as failed:
            run(["heal", "nowhere", "--data", "text", "--out", "healed"], 120)
        assert failed.value.returncode == 2
        with pytest.raises(subprocess.TimeoutExpired):
            run(["--version"], 0)


def test_children_are_compared_with_the_mips_in_pairs(tmp_path: Path, load_script, monkeypatch: pytest.MonkeyPatch):
    """Sequence by sequence: these differ by much more from each other than the children do on any of them."""
    script = load_script("quality/bench_chosen.py")
    bench = script.Bench({"parent": "p"}, tmp_path, (), 1, 60, 1)
    monkeypatch.setattr(bench, "name", lambda speed, method: method)
    for name, each in (("mip", [0.1, 0.5, 0.9]), ("all", [0.08, 0.47, 0.86]), ("older", None)):
        child = {"kl": 0.5} | ({} if each is None else {"kl_of_sequences": each})
        for kind in ("before", "chosen"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{name}{'-1.5' if kind == 'chosen' else ''}.json").write_text(
                json.dumps({"said": {"child": child}, "seconds": 1})
            )
    assert bench.over_mip("before", "all", 1.5) == pytest.approx((-0.03, 0.01 / 3**0.5))
    for name in ("mip", "older", "absent"):
        assert bench.over_mip("before", name, 1.5) is None
    assert bench.over_mip("before", "all", 2.0) is None  # no MIP there


def test_the_road_in_steps_is_told_of_the_tokens_it_healed_on(
    tmp_path: Path, load_script, monkeypatch: pytest.MonkeyPatch
):
    """Its children depend on them: a table of another healing has no row of it."""
    script = load_script("quality/bench_chosen.py")
    bench = script.Bench({"parent": "p", "heal": {"tokens": 10e6}}, tmp_path, (), 1, 60, 1)
    for name in ("library", "ran/steps-1e+07-2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        seconds = {"build-library": 1, "score": 1, "solve": 1, "step 1 solve": 1, "heal": 5, "step 1 heal": 6}
        (tmp_path / f"{name}.json").write_text(json.dumps({"said": {"seconds": seconds}, "seconds": 9}))
    solved = SimpleNamespace(speedup=2.0, objective=0.3, sub_blocks=[])
    monkeypatch.setattr(script, "read_architecture", {tmp_path / "steps-1e+07" / "2" / "solution": solved}.__getitem__)
    bench.tag = "-1e+07"
    assert bench.row(2.0, "steps")["heal_s"] == 11
    bench.tag = "-5e+07"
    assert bench.row(2.0, "steps") is None
    with pytest.raises(script.Waits):
        bench.measure(2.0, "steps")
