"""One yardstick: `bench`, `evaluate` and `run` say the same of the same child, workload and batch, whatever form it comes in."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from puzzle.measure import measurable, serve
from puzzle.measure.architecture import read_architecture, write_architecture
from puzzle.parents.opened import open_model
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.open import RUN_HERE, open_runtime, pick_precision

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 8)
TEXT = ("--sequences", 4, "--seq-len", 32)
SPEED = (
    "batch",
    "tokens_per_second",
    "ttft_seconds",
    "tpot_seconds",
    "decode_seconds",
    "memory_bytes",
    "workspace_bytes",
)


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes a second, so that speeds are equal where the same is timed."""
    ticks = count()
    monkeypatch.setattr(serve, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


@pytest.fixture
def solved(puzzle, own_library):
    assert puzzle("solve", own_library, "--params", "80%", *SOLVE, "--concurrency", 3).exit_code == 0
    return own_library / "solution"


def told(done) -> dict:
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def test_bench_and_evaluate_agree(puzzle, solved, own_library, parent, corpus, tmp_path, clock):
    """A child on disk, an architecture in its library, one with its library named."""
    child, elsewhere = tmp_path / "child", tmp_path / "elsewhere" / "architecture.json"
    assert puzzle("export", own_library, solved, "--out", child).exit_code == 0
    write_architecture(elsewhere, read_architecture(solved))
    benched = [told(puzzle("bench", t, "--gpu", "cpu", "--repeats", 1, "--json")) for t in (child, solved, elsewhere)]
    common = ("--data", corpus, *TEXT, "--repeats", 1, "--device", "cpu", "--json")
    forms = ((child,), (solved,), (solved / "architecture.json",), (elsewhere, "--library", own_library))
    evaluated = [told(puzzle("evaluate", parent, *form, *common)) for form in forms]
    speeds = [found["child"]["measured"] for found in benched] + [found["child"] for found in evaluated]
    assert [{name: one[name] for name in SPEED} for one in speeds] == [{n: speeds[0][n] for n in SPEED}] * len(speeds)
    assert speeds[0]["batch"] == 3
    assert {found["precision"] for found in (*benched, *evaluated)} == {"float32"}
    assert {json.dumps(found["workload"]) for found in (*benched, *evaluated)} == {'{"input_len": 16, "output_len": 8}'}
    assert [found["child"]["path"] for found in benched] == [str(one) for one in (child, solved, elsewhere)]
    assert [found["child"].pop("path") for found in evaluated] == [str(form[0]) for form in forms]
    marks = [found["child"].pop("fingerprint", None) for found in (*benched, *evaluated)]
    assert marks[0] == marks[3] == open_model(str(child)).fingerprint()
    assert marks[1:3] == [None, None]  # random weights
    assert marks[4] == marks[5] == marks[6] != marks[0]  # of the parent, and of the blocks of its library
    assert evaluated[0]["parent"]["path"] == str(parent)
    assert evaluated[0]["parent"]["fingerprint"] == open_model(str(parent)).fingerprint()
    assert all(found == evaluated[0] for found in evaluated)
    promised = read_architecture(solved).predicted
    assert evaluated[0]["child"]["memory_bytes"] == promised.memory_bytes
    assert evaluated[0]["child"]["kv_bytes_per_token"] == promised.kv_bytes_per_token


def test_fuse_takes_the_same(puzzle, one_line_error, costly, parent, corpus, tmp_path):
    goal = ("--throughput", "2.6x", "--fusion", "--gpu", "cpu", "--input-len", 16, "--output-len", 16)
    solved = read_architecture(costly / "solution") if puzzle("solve", costly, *goal).exit_code == 0 else None
    assert solved is not None
    assert solved.fuse
    facts = json.loads((costly / "library.json").read_text())
    facts["parent"] |= {"source": str(parent), "relative": False}
    (costly / "library.json").write_text(json.dumps(facts))
    assert puzzle("export", costly, costly / "solution", "--out", tmp_path / "child").exit_code == 0
    write_architecture(tmp_path / "elsewhere" / "architecture.json", solved)
    forms = ((tmp_path / "child",), (costly / "solution",), (tmp_path / "elsewhere", "--library", costly))
    for number, form in enumerate(forms):
        assert puzzle("fuse", *form, "--out", tmp_path / f"fused{number}").exit_code == 0
    tensors = [(tmp_path / f"fused{n}" / "model.safetensors").read_bytes() for n in range(len(forms))]
    assert tensors == tensors[:1] * len(forms)
    lost = puzzle("fuse", tmp_path / "elsewhere", "--out", tmp_path / "x")
    one_line_error(lost, "lies in no library: pass --library")


@pytest.mark.parametrize(
    ("device", "priced", "precision"),
    [
        ("cpu", None, "float32"), ("cpu", "float32", "float32"), ("cpu", "bf16", "float32"), ("cpu", "fp8", "float32"),
        ("cuda", None, "bf16"), ("cuda", "float32", "bf16"), ("cuda", "bf16", "bf16"), ("cuda", "fp8", "fp8"),
    ],
)  # fmt: skip
def test_precision_is_the_priced_one_where_it_runs(device, priced, precision):
    assert pick_precision(torch.device(device), priced) == precision


@pytest.mark.parametrize("precision", RUN_HERE["cuda"])
def test_on_a_gpu_the_fast_runtime_is_timed(puzzle, solved, parent, corpus, monkeypatch, precision):
    """`evaluate` asks `open_runtime` for the priced precision, which has no plain runtime on a GPU."""
    asked = []

    def open_it(model, batch, length, wanted, *, fp8, consume, ranks):
        assert fp8 is ranks is None  # nothing was solved for several precisions, or GPUs
        asked.append(wanted)
        return FastRuntime(model, batch, length, consume=consume)

    monkeypatch.setattr(measurable, "open_runtime", open_it)
    monkeypatch.setitem(RUN_HERE, "cpu", RUN_HERE["cuda"])
    monkeypatch.setattr(measurable, "DTYPES", dict.fromkeys(RUN_HERE["cuda"], torch.float32))
    found = read_architecture(solved)
    priced = replace(found, costs={**found.costs, "precision": precision})
    write_architecture(solved / "architecture.json", priced)
    done = puzzle("evaluate", parent, solved, "--data", corpus, *TEXT, "--repeats", 1, "--device", "cpu", "--json")
    assert told(done)["precision"] == precision
    assert set(asked) == {precision}
    here = SimpleNamespace(embedding=SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda"))))
    with pytest.raises(Exception, match="precision float32 has no runtime on a GPU"):
        open_runtime(here, 1, 8, "float32")
