"""`puzzle profile --shapes`: resumed, noisy, out of memory, on the wrong machine. On the CPU, where every path but CUDA's runs."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys

import pytest
import torch

from puzzle.base import device
from puzzle.base.errors import UserError
from puzzle.blocklib.fast import CachePool
from puzzle.kernels.timer import Timing
from puzzle.parents.known import named_shapes
from puzzle.profile import point as profile_point
from puzzle.profile.cost_table import CostTable
from puzzle.profile.gpu import GpuGrid, count_points, profile_shapes

GRID = GpuGrid(
    batches=(1, 4), contexts=(32, 64), rows=(32, 64), prompts=((1, 32), (2, 32)), wide=(2,), attention="kv2,linear",
    seconds=1e-4, min_samples=1,
)  # fmt: skip
KILLED = """
import os, signal
from pathlib import Path
from puzzle.profile import point as profile_point
from puzzle.blocklib.fast import CachePool
from puzzle.profile import gpu as profile_gpu
from puzzle.profile.gpu import GpuGrid, profile_shapes
real, left = profile_gpu.append_costs, [11]
def append(*arguments):
    real(*arguments)
    left[0] -= 1
    if not left[0]:
        with open(arguments[0], "a") as handle:
            handle.write("attention,half a li")
        os.kill(os.getpid(), signal.SIGKILL)
profile_gpu.append_costs = append
profile_shapes("reference", gpu="cpu", out=Path("OUT"), device="cpu", grid=GRID)
"""


def rows(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def keys(found):
    return [(r["kind"], r["shape"], r["phase"], r["batch"], r["context"]) for r in found]


def test_killed_and_resumed(tmp_path):
    code = KILLED.replace("OUT", str(tmp_path)).replace("GRID", repr(GRID))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = rows(tmp_path / "reference.partial.csv")[:11]
    path, facts = profile_shapes("reference", gpu="cpu", out=tmp_path, device="cpu", grid=GRID)
    found = rows(path)
    assert facts["points"] == len(found) == len(set(keys(found)))
    assert facts["measured_now"] == len(found) - 11
    by_key = dict(zip(keys(found), found, strict=True))
    assert all(by_key[key] == row for key, row in zip(keys(kept), kept, strict=True))
    assert not (tmp_path / "reference.partial.csv").exists()
    assert CostTable(path).batches == [1, 4]


def test_what_does_not_fit_is_recorded_and_skipped(tmp_path, monkeypatch):
    real = profile_point.Stage._time

    def short_of_memory(self, phase, batch, context):
        if phase == "decode" and batch == 4 and context == 64:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(self, phase, batch, context)

    monkeypatch.setattr(profile_point.Stage, "_time", short_of_memory)
    path, _ = profile_shapes("reference", gpu="cpu", out=tmp_path, device="cpu", grid=GRID)
    without = [r for r in rows(path) if r["num_samples"] == "0"]
    assert {(r["batch"], r["context"]) for r in without} == {("4", "64")}
    table = CostTable(path)
    attention = without[0]["shape"]
    near = table.seconds("attention", attention, "decode", 4, 32)
    assert table.seconds("attention", attention, "decode", 4, 64) == pytest.approx(2 * near)
    assert len(table.extrapolated) == 1


def test_weights_that_do_not_fit_are_recorded_too(tmp_path, monkeypatch):
    real = profile_point.Stage._load

    def short_of_memory(self, target):
        if target.shape == "h256 f1408":
            raise torch.cuda.OutOfMemoryError("out of memory")
        real(self, target)

    monkeypatch.setattr(profile_point.Stage, "_load", short_of_memory)
    path, _ = profile_shapes("reference", gpu="cpu", out=tmp_path, device="cpu", grid=GRID)
    without = {r["shape"] for r in rows(path) if r["num_samples"] == "0"}
    assert without == {"h256 f1408"}  # twice the parent's width
    assert "h256 f1408" not in CostTable(path).shapes("ffn")


def test_caches_from_a_pool():
    """Caches of one point do not share memory, hold noise, and the next point takes the same memory again."""
    pool = CachePool(4 * 1000, torch.float32, torch.device("cpu"))
    first, second = pool.take((10, 30)), pool.take((700,))
    assert pool.num_bytes == 4000
    assert first.std() > 0.5
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    with pytest.raises(ValueError, match="does not fit"):
        pool.take((1,))
    pool.used = 0
    assert pool.take((10, 30)).data_ptr() == first.data_ptr()


def test_a_noisy_point_is_timed_again(monkeypatch):
    timings = [Timing(p20=1.0, p50=2.0, p80=3.0, num_samples=5), Timing(p20=1.9, p50=2.0, p80=2.01, num_samples=5)]
    monkeypatch.setattr(profile_point, "time_replays", lambda *_: timings.pop(0))
    stage = object.__new__(profile_point.Stage)
    stage.device, stage.on_gpu, stage.seconds, stage.min_samples = torch.device("cpu"), False, 0.0, 1
    assert stage._measured(lambda: None, 1, 1.0, 0.0, 0).timing.p20 == 1.9
    assert timings == []


def test_wrong_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(device, "this_gpu", lambda _: "NVIDIA A100-SXM4-40GB")
    with pytest.raises(UserError, match="--gpu h100: this machine has NVIDIA A100-SXM4-40GB"):
        profile_shapes("reference", gpu="h100", out=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_and_bad_requests(puzzle, library, tmp_path):
    for arguments, message in (
        (("--shapes", "llama-3.1-8b", "--gpu", "h100"), "no CUDA device can be used here ("),
        ((library, "--gpu", "h100"), "no CUDA device can be used here ("),
        (("--shapes", "llama-8b", "--gpu", "h100"), "--shapes llama-8b is unknown: did you mean 'llama-3.1-8b'?"),
        (("--gpu", "h100"), "--gpu h100 wants a LIBRARY, or --shapes with a name"),
    ):
        done = puzzle("profile", *arguments, "--out", tmp_path / "costs")
        assert done.exit_code == 2, done.output
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.csv"))


def test_dry_run_counts_what_would_be_measured(puzzle):
    done = puzzle("profile", "--shapes", "llama-3.1-8b", "--gpu", "h100", "--dry-run", "--json")
    assert done.exit_code == 0
    assert f'"points": {count_points(named_shapes("llama-3.1-8b"))},' in done.stdout
