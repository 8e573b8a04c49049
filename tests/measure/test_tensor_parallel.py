"""`bench --tp` and `profile --all-reduce` as torchrun starts them, over gloo."""

from __future__ import annotations

import json

import pytest
import torch

from puzzle.library.manifest import Library
from puzzle.profile.all_reduce import read_all_reduces
from puzzle.profile.all_reduce_timer import SIZES

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")


@pytest.fixture(scope="module")
def solved(tmp_path_factory, puzzle, library, gpu_table, shared_library):
    """An architecture for two GPUs, of tables that were made up."""
    from shutil import copytree

    copy = copytree(library, tmp_path_factory.mktemp("tp") / "lib")
    gpu_table(shared_library(Library.open(copy), 2), "bf16", "tiny-tp2")
    work = ("--input-len", 16, "--output-len", 8, "--out", copy / "solution")
    done = puzzle("solve", copy, "--latency", "80%", "--gpu", "h100", "--tp", 2, "--shapes", "tiny", *work)
    assert done.exit_code == 0, done.output
    return copy / "solution"


def test_bench_of_an_architecture(torchrun, solved):
    """Two processes run the shares of parent and child, and one speaks."""
    options = ("--gpu", "cpu", "--with-parent", "--repeats", 2, "--json")
    (first, text, told), (second, silence, _) = torchrun(2, "-m", "puzzle", "bench", solved, *options)
    assert (first, second, silence) == (0, 0, ""), told
    found, promised = json.loads(text), json.loads((solved / "architecture.json").read_text())
    assert found["tp"] == 2
    for who, side in (("child", "predicted"), ("parent", "parent_predicted")):
        assert found[who]["predicted"] is None
        assert found[who]["measured"]["batch"] == promised[side]["batch"]
        assert found[who]["measured"]["tpot_seconds"] > 0


def test_bench_of_a_checkpoint_holds_half_of_it(torchrun, puzzle, child):
    options = ("--gpu", "cpu", "--input-len", 8, "--output-len", 4, "--batch", 2, "--repeats", 1, "--json")
    (code, text, told), _ = torchrun(2, "-m", "puzzle", "bench", child, "--tp", 2, *options)
    assert code == 0, told
    half, whole = json.loads(text), json.loads(puzzle("bench", child, *options).stdout)
    ratio = half["child"]["measured"]["memory_bytes"] / whole["child"]["measured"]["memory_bytes"]
    assert 0.4 < ratio < 0.8  # caches there are of whole pages, here of tokens


def test_all_reduces_are_measured_and_kept_beside_others(torchrun, tmp_path, solved):
    out = solved.parent / "costs" / "all_reduce"
    out.mkdir(exist_ok=True)
    (out / "cpu.csv").write_text("tp,num_bytes,seconds,device,versions,date\n4,64,1e-5,a,b,c\n2,64,1,a,b,c\n")
    options = ("profile", solved.parent, "--gpu", "cpu", "--tp", 2, "--all-reduce")
    few = "t.measure_all_reduces.__defaults__ = ((64, 96, 4096),)"
    code = f"from puzzle.profile import all_reduce_timer as t; {few}; from puzzle.cli import main; main()"
    for status, _, told in torchrun(2, "-c", code, *options):
        assert status == 0, told
    rows = read_all_reduces(out / "cpu.csv")
    assert [(row.tp, row.num_bytes) for row in rows] == [(2, 64), (2, 96), (2, 4096), (4, 64)]
    assert [row.device == "a" for row in rows] == [False, False, False, True]
    assert all(row.seconds > 0 for row in rows)
    assert (SIZES[0], SIZES[-1]) == (64, 3 * 2**28)
    (out / "cpu.csv").unlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "CHILD", "--tp", 2, "--input-len", 8, "--output-len", 4), "--tp 2: 1 process was started: start 2"),
        (("bench", "CHILD", "--tp", 3, "--input-len", 8, "--output-len", 4), "--tp 3: the GPUs of one host"),
        (("bench", "CHILD", "--tp", 2, "--engine", "vllm"), "--tp is not used with --engine"),
        (("bench", "SOLVED"), "--tp 2: 1 process was started: start 2, by `torchrun --nproc-per-node 2 -m puzzle"),
        (("profile", "--all-reduce", "--tp", 2), "--tp 2: 1 process was started"),
        (("profile", "--all-reduce"), "--all-reduce needs --tp"),
        (("profile", "--all-reduce", "--tp", 2, "--fp8"), "--fp8 is not used with --all-reduce"),
        (("profile", "LIBRARY", "--tp", 2), "--tp 2: shares are priced on GPUs, and --gpu is cpu"),
    ],
)
def test_refusals(puzzle, one_line_error, child, solved, arguments, words):
    named = {"CHILD": child, "SOLVED": solved, "LIBRARY": solved.parent}
    one_line_error(puzzle(*(named.get(a, a) for a in arguments), "--gpu", "cpu"), words)
