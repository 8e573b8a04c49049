"""Scores of a parent that is streamed layer by layer: the same bits, in as many passes as memory asks for, killed anywhere."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from puzzle.base import device
from puzzle.base.errors import UserError
from puzzle.library.plan import scoring
from puzzle.library.score import ScoreOptions, Scoring, score_library
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model
from puzzle.runtime import residency
from puzzle.runtime.stream import Job, Layered, Reader, Room

OPTIONS = {"sequences": 4, "device": "cpu"}


def scores(library: Path) -> dict[str, dict]:
    return {p.name: json.loads(p.read_text())["scores"] for p in sorted((library / "scores").glob("L*.json"))}


@pytest.fixture
def light(monkeypatch) -> None:
    """Of the process that is measured, nothing counts."""
    monkeypatch.setattr(device, "held_memory", lambda on: 0)
    monkeypatch.setattr(residency, "held_memory", lambda on: 0)


@pytest.fixture
def copied(deep_library, tmp_path, light) -> Path:
    """The library to be scored."""
    return shutil.copytree(deep_library, tmp_path / "lib")


def limit_for(library: Path, parent: Path, corpus: Path, streams: int, **options) -> int:
    """A --memory-limit within which `streams` variants go along in a pass and the parent does not fit."""
    work = Scoring(library, [str(corpus)], ScoreOptions(**OPTIONS, **options), str(parent))
    passing = scoring(
        work.parent.structure, work.results.wanted, work.library.spaces, sequences=4, seq_len=32, compute_bytes=4
    )
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


def test_scoring_is_killed_and_goes_on(launch, ended, held, wait, copied, deep, corpus, tmp_path):
    """kill -9 after the first pass: what is written stays, byte for byte, and what is missing is added."""
    limit = limit_for(copied, deep, corpus, 6)
    whole = shutil.copytree(copied, tmp_path / "whole")
    score_library(whole, [str(corpus)], ScoreOptions(**OPTIONS), parent=str(deep))
    script = f"""
from pathlib import Path
from puzzle.base import device
from puzzle.runtime import residency
from puzzle.library.score import ScoreOptions, score_library
device.held_memory = residency.held_memory = lambda on: 0
score_library(Path({str(copied)!r}), [{str(corpus)!r}], ScoreOptions(memory_limit={limit}, **{OPTIONS!r}), parent={str(deep)!r})
raise SystemExit(0)
"""
    (process,) = launch((), setup=held("puzzle.library.results.Results.put", 48) + script)
    wait((copied / "scores/L01.json").exists, process)
    process.kill()
    process.join()
    before = scores(copied)
    assert 0 < sum(map(len, before.values())) < 48
    assert ended(launch((), setup=script)) == [0]
    after = scores(copied)
    assert after == scores(whole)
    assert all(after[name][one] == value for name, found in before.items() for one, value in found.items())


def test_a_scoring_that_is_complete_loads_no_parent(puzzle, copied, deep, corpus, monkeypatch):
    asked = ("score", copied, "--data", corpus, "--parent", deep, "--sequences", 2, "--device", "cpu")
    planned = json.loads(puzzle(*asked, "--dry-run", "--json").stdout)
    assert planned["missing"] == 48
    assert planned["plan"]["passes"] == 12  # a layer each
    assert not (copied / "scores").exists()
    assert puzzle(*asked).exit_code == 0
    monkeypatch.setattr("puzzle.library.score.Scorer", None)
    assert "all are scored already" in puzzle(*asked).stderr
    assert json.loads(puzzle(*asked, "--dry-run", "--json").stdout)["missing"] == 0


GB = 10**9


SEVENTY = known_structure("llama-3.3-70b")


@pytest.mark.parametrize(
    ("card", "host", "wanted", "together"),
    [
        (72, 400, 960, range(300, 450)),  # an H100: some streams on it, most in host memory
        (72, 8, 960, range(40, 70)),  # layers alone go through host memory
        (280, 0, 960, range(12, 13)),  # whole: the variants of a layer
    ],
)
def test_plans_of_70b(card, host, wanted, together):
    passing = residency.Passing(
        models=[SEVENTY], sequences=64, seq_len=1024, compute_bytes=2, spare=3, wanted=wanted, at_once=12, beside=10**9
    )
    memory = residency.Memory(device=card * GB, host=host * GB)
    plan = residency.plan_residency("scoring", passing, memory, 8)
    assert plan.streamed == (card < 150)
    assert plan.together in together
    assert plan.device_bytes <= card * GB
    assert plan.host_bytes <= host * GB


@pytest.mark.parametrize(
    ("card", "host", "said"),
    [
        (5, 400, "scoring 64 sequences of 1024 tokens needs .* in all: use fewer"),
        (72, 2, "of host memory, where 2.1 GiB are free"),
    ],
)
def test_what_does_not_fit_is_said(card, host, said):
    passing = residency.Passing(
        models=[SEVENTY], sequences=64, seq_len=1024, compute_bytes=2, spare=3, wanted=960, at_once=12
    )
    with pytest.raises(UserError, match=said):
        residency.plan_residency("scoring", passing, residency.Memory(device=card * GB, host=host * GB), 8)


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


def test_what_is_read_ahead_changes_no_score(puzzle, copied, deep, corpus, monkeypatch):
    """From one pass to the next, as on a GPU; and in a few large batches the same scores but for rounding."""
    asked = ("score", copied, "--data", corpus, "--parent", deep, "--sequences", 4, "--device", "cpu")
    assert puzzle(*asked).exit_code == 0
    whole, plain = scores(copied), Scoring.plan
    shutil.rmtree(copied / "scores")
    monkeypatch.setattr(Scoring, "plan", lambda self, todo: replace(plain(self, todo), ahead=5))
    done = puzzle(*asked)
    assert done.exit_code == 0, (done.output, done.exception)
    assert scores(copied) == whole


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_reader_keeps_order_and_stops(count):
    """So many results wait at most; one that fails is told where its turn is, and no more are read."""
    reader, read = Reader(torch.device("cpu"), torch.float32), []

    def one(number: int) -> int:
        read.append(number)
        if number == 8:
            raise UserError("eight")
        return number

    taken = []
    with pytest.raises(UserError, match="eight"):
        taken.extend(reader.ahead((partial(one, n) for n in range(200)), lambda _: (), count))
    assert taken == list(range(8))
    assert len(read) <= 9 + count + 1
    read.clear()
    asked = reader.ahead((partial(one, n) for n in range(7)), lambda _: (), count)
    assert list(asked) == read == list(range(7))


@pytest.mark.parametrize(
    ("hidden", "sequences", "on_host", "taken"),
    [(4096, 64, False, 8), (576, 64, False, 32), (576, 64, True, 8), (576, 3, False, 8), (64, 1000, False, 500)],
)
def test_batches_of_narrow_models_fill_a_gpu(hidden, sequences, on_host, taken):
    structure = replace(SEVENTY, hidden_size=hidden)
    passing = residency.Passing(models=[structure], sequences=sequences, seq_len=1024, compute_bytes=2, spare=3)
    assert passing.batch(8, residency.Memory(device=GB, host=GB, on_host=on_host)) == taken


@pytest.mark.gpu
def test_few_passes_over_memory_change_rounding_alone(deep, light):
    """Streams of a model whose layers are those of training, against the plain ones, both in bf16."""
    ids, on = [torch.randint(1, 100, (2, 128), generator=torch.Generator().manual_seed(0)).cuda()], torch.device("cuda")
    found = []
    for forward in (True, False):
        model = Layered(open_model(str(deep)), on, torch.bfloat16, streamed=False, forward=forward)
        with torch.no_grad():
            found.append(model.hidden(ids, Room(on, 1)).batches[0].double())
    assert model.in_training is False
    assert (found[0] - found[1]).norm() / found[1].norm() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("waiting", [0, 4, 60])
def test_streams_on_a_gpu(puzzle, copied, deep, corpus, waiting):
    """Weights through pinned memory, streams on the device, in host memory, or both: the scores are those of the whole parent."""
    asked = ("score", copied, "--data", corpus, "--parent", deep, "--sequences", 4, "--device", "cuda")
    assert puzzle(*asked).exit_code == 0
    whole = scores(copied)
    shutil.rmtree(copied / "scores")
    work = Scoring(copied, [str(corpus)], ScoreOptions(sequences=4, device="cuda"), str(deep))
    passing = scoring(
        work.parent.structure, work.results.wanted, work.library.spaces, sequences=4, seq_len=32, compute_bytes=2
    )
    limit = int((passing.streamed(4) + waiting * passing.stream_bytes()) / device.PLANNED) + 1000
    done = puzzle(*asked, "--memory-limit", limit)
    assert "layer by layer" in done.stderr, (done.output, done.exception)
    assert scores(copied) == whole


def test_batches_come_and_go_in_order():
    """A room gives back what was put last, whatever waits where, and counts what is on the device."""
    room = Room(torch.device("cpu"), 1)
    first = room.filled(torch.full((1, 2), float(n)) for n in range(3))
    second = room.copy(first)
    room.run(
        [Job(first, second, lambda x: x + 10), Job(second, second, lambda x: 2 * x), Job(first, first, lambda x: -x)]
    )
    assert [x[0, 0].item() for x in room.fetched((second, n) for n in range(3))] == [20, 22, 24]
    assert [x[0, 0].item() for x in room.fetched((first, n) for n in range(3))] == [0, -1, -2]
    room.drop(first, second)
    assert room.free == 1


def test_an_error_of_the_reading_thread_is_told(light, deep, tmp_path):
    """By the caller's own, one layer ahead or not."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(deep, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    model = Layered(open_model(broken), torch.device("cpu"), torch.float32, streamed=True)
    seen = []
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj\.weight .* has 1 NaN"):
        seen.extend(index for index, _ in model.blocks())
    assert len(seen) <= 3
