"""`profile`: resumed, out of memory, on the wrong machine. A GPU's profile on the CPU, where every path but CUDA's runs."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace

import pytest
import torch

from puzzle.base import device
from puzzle.base.errors import UserError
from puzzle.blocklib.variant import search_spaces
from puzzle.library.manifest import Library
from puzzle.parents.known import known_structure
from puzzle.profile import grid as grids
from puzzle.profile.cost_table import CostTable
from puzzle.profile.cpu import CpuTimer
from puzzle.profile.gpu import GpuTimer
from puzzle.profile.grid import Grid, cpu_grid, gpu_grid, targets, whole_of
from puzzle.profile.parts import Whole
from puzzle.profile.profile import Subject, count_points, profile, subject_named, subject_of

GRID = Grid(
    batches=(1, 4), contexts=(32, 64), rows=(32, 64), prompts=((1, 32), (2, 32)), by_rows=True, wide=(2,),
    seconds=1e-4, min_samples=1,
)  # fmt: skip
KILLED = """
import os, signal, sys
from pathlib import Path
from puzzle.profile import profile as room
from puzzle.profile.grid import Grid
from puzzle.blocklib.variant import search_spaces
from puzzle.parents.known import known_structure
real, left = room.append_costs, [11]
def append(*arguments):
    real(*arguments)
    left[0] -= 1
    if not left[0]:
        with open(arguments[0], "a") as handle:
            handle.write("gqa h256 q8,half a li")
        os.kill(os.getpid(), signal.SIGKILL)
room.append_costs = append
structure = known_structure("reference")
space = search_spaces({0: structure.layers[0]}, {"attention": "kv2,linear"})[0]
offered = tuple((slot, b) for slot, names in space.items() for b in names.values())
subject = room.Subject(name="reference", structure=structure, offered=offered)
room.profile(subject, gpu="h100", out=Path("OUT"), device="cpu", grid=GRID)
"""
KV4 = "gqa h256 q8 kv4 d32"


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The reference parent with two of its attention's variants and all of its FFN's."""
    structure = known_structure("reference")
    space = search_spaces({0: structure.layers[0]}, {"attention": "kv2,linear"})[0]
    offered = tuple((slot, b) for slot, names in space.items() for b in names.values())
    return Subject(name="reference", structure=structure, offered=offered)


def rows(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def keys(found):
    return [(r["part"], r["phase"], r["batch"], r["context"]) for r in found]


def test_killed_and_resumed(tmp_path, subject, python):
    code = KILLED.replace("OUT", str(tmp_path)).replace("GRID", repr(GRID))
    ended, _, told = python("-c", code)
    assert ended == -signal.SIGKILL, told
    kept = rows(tmp_path / "reference.partial.csv")[:11]
    path, facts = profile(subject, gpu="h100", out=tmp_path, device="cpu", grid=GRID)
    found = rows(path)
    assert facts["points"] == len(found) == len(set(keys(found))) == count_points(subject, GRID)
    assert facts["measured_now"] == len(found) - 11
    by_key = dict(zip(keys(found), found, strict=True))
    assert all(by_key[key] == row for key, row in zip(keys(kept), kept, strict=True))
    assert not (tmp_path / "reference.partial.csv").exists()
    assert CostTable(path).batches == [1, 4]


def test_points_of_another_grid_are_no_part_of_the_table(tmp_path, subject, python):
    """What an interrupted run has measured beyond what is asked for now would be a table with holes."""
    ended, _, told = python("-c", KILLED.replace("OUT", str(tmp_path)).replace("GRID", repr(GRID)))
    assert ended == -signal.SIGKILL, told
    grid = replace(GRID, batches=(4, 8))
    path, facts = profile(subject, gpu="h100", out=tmp_path, device="cpu", grid=grid)
    assert {row["batch"] for row in rows(path) if row["phase"] == "decode"} == {"4", "8"}
    assert facts["points"] == len(rows(path)) == count_points(subject, grid)
    kept = rows(tmp_path / "reference.partial.csv")  # for that grid
    assert kept
    assert not set(keys(kept)) & set(keys(rows(path)))


def test_what_does_not_fit_is_recorded_and_skipped(tmp_path, monkeypatch, subject):
    real = GpuTimer._time

    def short_of_memory(self, sub_block, at):
        if (at.phase, at.batch, at.context) == ("decode", 4, 64):
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(self, sub_block, at)

    monkeypatch.setattr(GpuTimer, "_time", short_of_memory)
    path, _ = profile(subject, gpu="h100", out=tmp_path, device="cpu", grid=GRID)
    without = [r for r in rows(path) if r["num_samples"] == "0"]
    assert {(r["batch"], r["context"]) for r in without} == {("4", "64")}
    assert {r["part"] for r in without} == {KV4, "gqa h256 q8 kv2 d32"}
    table, attention = CostTable(path), subject.structure.layers[0]["attention"]
    near = table.seconds(attention, "decode", 4, 32)
    assert table.seconds(attention, "decode", 4, 64) == pytest.approx(2 * near)
    assert list(table.extrapolated) == [(KV4, "decode", 4)]


def test_weights_that_do_not_fit_are_recorded_too(tmp_path, monkeypatch, subject):
    real = GpuTimer._load

    def short_of_memory(self, target):
        if target.key == "swiglu h256 f1408":
            raise torch.cuda.OutOfMemoryError("out of memory")
        real(self, target)

    monkeypatch.setattr(GpuTimer, "_load", short_of_memory)
    path, _ = profile(subject, gpu="h100", out=tmp_path, device="cpu", grid=GRID)
    without = {r["part"] for r in rows(path) if r["num_samples"] == "0"}
    assert without == {"swiglu h256 f1408"}  # twice the parent's width
    assert "swiglu h256 f1408" not in CostTable(path).parts()
    assert "swiglu h256 f704" in CostTable(path).parts()


def test_a_cpu_is_measured_by_the_plain_modules(tmp_path, library):
    """The whole parent, its ends and everything that the library offers, at every batch and context, in float32."""
    grid = Grid(batches=(1, 2), contexts=(8, 16), prompts=((1, 8), (2, 8)), whole=True, seconds=1e-4, min_samples=1)
    offered = subject_of(Library.open(library))
    path, facts = profile(offered, gpu="cpu", out=tmp_path, grid=grid)
    found, table = rows(path), CostTable(path)
    parts = {"model parent", "embedding h32 v384", "head h32 v384"}
    parts |= {b.timed().key() for _, b in offered.offered if b.tensors()}
    assert set(table.parts()) == parts
    points = {("decode", b, c) for b in "12" for c in ("8", "16")} | {("prefill", b, "8") for b in "12"}
    assert set(keys(found)) == {(part, *point) for part in parts for point in points}
    assert facts["points"] == len(found) == count_points(offered, grid)
    assert facts["precision"] == table.precision == "float32"


@pytest.mark.parametrize(
    ("name", "depth"), [("qwen3-30b-a3b", 10), ("llama-3.1-405b", 2), ("llama-3.1-8b", 29), ("smollm2-135m", None)]
)
def test_of_a_parent_that_is_too_large_the_first_layers_are_measured(name, depth):
    """In prefill; in decode where these are most of it."""
    structure, grid = known_structure(name).timed(), gpu_grid()
    whole = whole_of(structure, grid)
    assert whole == Whole(depth)
    (points,) = (target.points for target in targets(structure, [], grid) if isinstance(target.part, Whole))
    decode = [at.batch for at in points if at.phase == "decode"]
    assert decode == (list(grid.batches) if whole.tells_of(structure.num_layers) else [])
    assert len(points) > len(decode)
    assert whole.tells_of(structure.num_layers) == (name in ("llama-3.1-8b", "smollm2-135m"))
    on_cpu = [target.part for target in targets(structure, [], cpu_grid()) if isinstance(target.part, Whole)]
    assert on_cpu == [Whole()]


def test_one_layer_is_the_least_that_stands_for_all(monkeypatch):
    monkeypatch.setattr(grids, "WHOLE_WEIGHT_BYTES", 1)
    assert whole_of(known_structure("reference"), gpu_grid()) == Whole(1)


@pytest.mark.parametrize("most", [True, False])
def test_a_partial_whole_is_measured_and_read(tmp_path, monkeypatch, subject, most):
    layers = subject.structure.num_layers
    layer = sum(2 * part.num_parameters for part in subject.structure.layers[0].values())
    depth = layers // 2 + most
    monkeypatch.setattr(grids, "WHOLE_WEIGHT_BYTES", (depth + 0.5) * layer)
    grid = replace(GRID, whole=True, wide=())
    path, facts = profile(subject, gpu="h100", out=tmp_path, device="cpu", grid=grid)
    found, table = rows(path), CostTable(path)
    assert facts["points"] == len(found) == count_points(subject, grid)
    measured = {(r["phase"], r["batch"]) for r in found if r["part"] == Whole(depth).key()}
    assert {batch for phase, batch in measured if phase == "decode"} == ({"1", "4"} if most else set())
    assert any(phase == "prefill" for phase, _ in measured)
    each = table.between_parts(subject.structure, 4)
    if most:
        whole, parts, count = table._whole_and_parts(subject.structure, "decode", 4, 1)
        assert parts + count * each == pytest.approx(whole)
    else:
        assert each == 0.0


def test_wrong_machine(monkeypatch, tmp_path, subject):
    monkeypatch.setattr(device, "this_gpu", lambda _: "NVIDIA A100-SXM4-40GB")
    with pytest.raises(UserError, match="`gpu` h100: this machine has NVIDIA A100-SXM4-40GB"):
        profile(subject, gpu="h100", out=tmp_path)


def test_wrong_precision(tmp_path, subject):
    for gpu, precision in (("cpu", "fp8"), ("cpu", "bf16"), ("h100", "float32"), ("h100", "int4")):
        with pytest.raises(UserError, match=f"precision {precision} cannot be profiled on {gpu}: float32 can on a CPU"):
            profile(subject, gpu=gpu, out=tmp_path, precision=precision, device="cpu", grid=GRID)
    assert not list(tmp_path.rglob("*.csv"))


def test_no_gpu_and_bad_requests(puzzle, library, tmp_path):
    for arguments, message in (
        (("--shapes", "llama-3.1-8b", "--gpu", "h100"), "no CUDA device can be used here ("),
        ((library, "--gpu", "h100"), "no CUDA device can be used here ("),
        (("--shapes", "llama-8b", "--gpu", "h100"), "--shapes llama-8b is unknown: did you mean 'llama-3.1-8b'?"),
        (("--gpu", "h100"), "nothing to profile: name a LIBRARY (see `puzzle build-library`), or --shapes of a known"),
    ):
        done = puzzle("profile", *arguments, "--out", tmp_path / "costs")
        assert done.exit_code == 2, done.output
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.csv"))


def test_an_odd_grid(puzzle, library, tmp_path):
    """Without order, and twice: every point is measured once, in every round."""
    sizes = ("--contexts", "32,16,32", "--prefill", "16,8,16", "--seconds", 0.001, "--rounds", 2)
    found = []
    for batches in ("4,1,1,4", "1,4"):
        asked = (library, "--gpu", "cpu", "--batches", batches, *sizes, "--out", tmp_path / batches, "--json")
        done = puzzle("profile", *asked)
        assert done.exit_code == 0, (done.output, done.exception)
        found.append(json.loads(done.stdout))
    assert found[0]["points"] == found[1]["points"]
    assert found[0]["measured_now"] == found[1]["measured_now"]
    assert gpu_grid(batches=(8, 1, 8)).batches == (1, 8)


def test_dry_run_counts_what_would_be_measured(puzzle):
    done = puzzle("profile", "--shapes", "llama-3.1-8b", "--gpu", "h100", "--dry-run", "--json")
    assert done.exit_code == 0
    named = subject_named("llama-3.1-8b", known_structure("llama-3.1-8b"))
    assert json.loads(done.stdout)["points"] == count_points(named, gpu_grid())


@pytest.mark.parametrize(("references", "rounds"), [([1.0, 1.09], 1), ([1.0, 1.2], 3), ([1.2, 1.0], 3)])
def test_a_steady_machine_is_walked_once(subject, tmp_path, monkeypatch, timed_reference, references, rounds):
    """Further rounds are for a machine whose speed changed while it was profiled."""
    grid = Grid(batches=(1,), contexts=(8,), prompts=((1, 8),), seconds=1e-4, min_samples=1, rounds=3)
    assert timed_reference(CpuTimer(subject.structure, grid)) > 0
    shown = iter([*references, *[1.0] * 99])
    monkeypatch.setattr(CpuTimer, "reference", lambda self: next(shown))
    _, facts = profile(subject, gpu="cpu", out=tmp_path, grid=grid)
    assert facts["measured_now"] == rounds * facts["points"]
