"""Scores of a parent that is streamed layer by layer: the same bits, in as many passes as memory asks for, killed anywhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from puzzle.base import device
from puzzle.library.plan import scoring
from puzzle.library.score import ScoreOptions, Scoring
from puzzle.runtime import residency

OPTIONS = {"sequences": 4, "device": "cpu"}


def scores(library: Path) -> dict[str, dict]:
    return {p.name: json.loads(p.read_text())["scores"] for p in sorted((library / "scores").glob("L*.json"))}


@pytest.fixture
def copied(deep_library, tmp_path, monkeypatch) -> Path:
    """The library to be scored; of the process that does it, nothing counts."""
    monkeypatch.setattr(device, "held_memory", lambda on: 0)
    monkeypatch.setattr(residency, "held_memory", lambda on: 0)
    return shutil.copytree(deep_library, tmp_path / "lib")


def limit_for(library: Path, parent: Path, corpus: Path, streams: int, **options) -> int:
    """A --memory-limit within which `streams` variants go along in a pass and the parent does not fit."""
    work = Scoring(library, [str(corpus)], ScoreOptions(**OPTIONS, **options), str(parent))
    passing = scoring(work.parent.structure, work.wanted, work.library.spaces, sequences=4, seq_len=32, compute_bytes=4)
    limit = int((passing.streamed(4) + (3 + streams) * passing.stream_bytes()) / device.PLANNED) + 1000
    assert limit < work.parent.structure.num_parameters * 4
    return limit


@pytest.mark.parametrize(("options", "flags"), [({}, ()), ({"fp8": True, "joint": True}, ("--fp8", "--joint"))])
def test_streamed_scores_are_the_resident_ones_to_the_bit(puzzle, capfd, copied, deep, corpus, options, flags):
    asked = ("score", copied, "--data", corpus, "--parent", deep, "--sequences", 4, "--device", "cpu", *flags)
    done = puzzle(*asked)
    assert "the parent whole on the device" in done.stderr, (done.output, done.exception)
    whole = scores(copied)
    count = sum(map(len, whole.values()))
    for streams in (5, 30):
        shutil.rmtree(copied / "scores")
        limit = limit_for(copied, deep, corpus, streams, **options)
        done = puzzle(*asked, "--memory-limit", limit)
        assert done.exit_code == 0, (done.output, done.exception)
        found = re.search(r"layer by layer, (\d+) passes of up to (\d+) variants", done.stderr)
        assert found is not None, done.stderr
        assert [int(x) for x in found.groups()] == [-(-count // streams), streams]
        assert scores(copied) == whole


@pytest.fixture
def light(monkeypatch) -> None:
    """Of the process that is measured, nothing counts."""
    monkeypatch.setattr(device, "held_memory", lambda on: 0)
    monkeypatch.setattr(residency, "held_memory", lambda on: 0)


def test_evaluation_streamed_is_that_of_whole_models(puzzle, light, deep, corpus, make_child, tmp_path):
    """And says that there is no speed, and no continuation, of what does not fit."""
    child = make_child(deep, tmp_path / "child")
    asked = ("evaluate", deep, child, "--data", corpus, "--sequences", 4, "--seq-len", 32, "--device", "cpu", "--json")
    whole = puzzle(*asked, "--no-speed")
    assert "both models whole on the device" in whole.stderr, (whole.output, whole.exception)
    limited = (*asked, "--memory-limit", 8_000_000, "--prompt", "def f", "--repeats", 1)
    done = puzzle(*limited)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "both models layer by layer" in done.stderr
    assert "does not fit whole into the" in done.stderr
    assert "no continuations:" in done.stderr
    assert json.loads(done.stdout) == json.loads(whole.stdout)
    planned = json.loads(puzzle(*limited, "--dry-run").stdout)
    assert planned["plan"]["streamed"]
    assert planned["plan"]["device_bytes"] < 8_000_000
    assert "does not fit" in planned["no_speed"]


def test_dependency_streamed_is_that_of_a_whole_model(puzzle, light, deep, corpus, tmp_path):
    found = []
    for limit in (10**9, 5_000_000):
        out = tmp_path / f"{limit}.json"
        sizes = ("--sequences", 4, "--seq-len", 32, "--device", "cpu", "--memory-limit", limit)
        done = puzzle(
            "fuse", deep, "--data", corpus, "--dependency-only", "--parallel-blocks", *sizes, "--out", out, "--json"
        )
        assert done.exit_code == 0, (done.output, done.exception)
        found.append((json.loads(done.stdout), done.stderr))
    assert "the model whole on the device" in found[0][1]
    assert int(re.search(r"layer by layer, (\d+) passes", found[1][1])[1]) > 1, found[1][1]
    assert found[0][0] | {"written": []} == found[1][0] | {"written": []}
