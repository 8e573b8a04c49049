"""`solve --tp`: what is promised is the shares' prices and their sums, and bytes are of each GPU."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from puzzle.base.workload import PAGE, PREFILL_ROWS, Workload
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.choose.cost_model import CostModel
from puzzle.choose.fusion import WideFfn
from puzzle.library.manifest import Library
from puzzle.measure.architecture import read_architecture
from puzzle.parents.known import known_structure
from puzzle.profile.all_reduce import AllReduceRow, AllReduces, find_all_reduces, read_all_reduces, write_all_reduces
from puzzle.profile.cost_table import PACKAGED, CostTable
from puzzle.profile.parts import Head, ends_of
from puzzle.profile.profile import subject_named

TP, IN, OUT = 2, 16, 8
WORK = ("--input-len", IN, "--output-len", OUT)
POINTS = {256: 1e-6, 1024: 3e-6, 512: 2.5e-6, 65536: 9e-6}  # bytes: seconds


@pytest.fixture
def priced(library, gpu_table, shared_library, tmp_path) -> Path:
    """A library with tables of the whole and of two ranks' shares in bf16 and fp8, and of their all-reduces."""
    copy = shutil.copytree(library, tmp_path / "lib")
    opened = Library.open(copy)
    gpu_table(opened, "bf16", "tiny")
    for precision, name in (("bf16", "tiny-tp2"), ("fp8", "tiny-tp2-fp8")):
        gpu_table(shared_library(opened, TP), precision, name)
    rows = [
        AllReduceRow(tp=tp, num_bytes=n, seconds=s * tp / 2, device="a GPU", versions="none", date="2026-11-27")
        for n, s in POINTS.items()
        for tp in (2, 4)
    ]
    write_all_reduces(copy / "costs" / "all_reduce" / "h100.csv", rows)
    return copy


def sum_seconds(num_bytes: int) -> float:
    """By hand: linear between the points, the smallest's below."""
    known = sorted(POINTS.items())
    if num_bytes <= known[0][0]:
        return known[0][1]
    (left, low), (right, high) = next((a, b) for a, b in itertools.pairwise(known) if num_bytes <= b[0])
    return low + (high - low) * (num_bytes - left) / (right - left)


def promise(solved, gpu_seconds, layers, batch: int, precision: str = "bf16") -> dict[str, float]:
    """By brute force: every part of a rank at every step, and every sum over ranks."""
    structure = solved.parent.with_layers(layers).share(TP)
    prefill, decode, memory, kept = 0.0, 0.0, 0, 0
    size = {"bf16": 2, "fp8": 1}[precision]
    for part in [b for _, _, b in structure if not isinstance(b, NoOp)] + ends_of(structure):
        rows = 1 if isinstance(part, Head) else IN
        each = 8 * TP if isinstance(part, Head) else structure.hidden_size * 2
        assert batch * IN <= PREFILL_ROWS
        prefill += sum_seconds(each * rows * batch)
        decode += (OUT - 1) * sum_seconds(each * batch)
        prefill += gpu_seconds(part, precision, "prefill", batch, IN)
        decode += sum(gpu_seconds(part, precision, "decode", batch, IN + step) for step in range(OUT - 1))
        if isinstance(part, SubBlock):
            kept += size * part.state().per_token
            memory += size * part.num_parameters + batch * part.state().num_bytes(IN + OUT, precision, PAGE)
    memory += 2 * structure.num_fixed_parameters
    return {
        "ttft_seconds": prefill,
        "latency_seconds": prefill + decode,
        "memory_bytes": memory,
        "kv_bytes_per_token": kept,
    }


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("goal", [("--latency", "80%"), ("--throughput", "1.3x")])
def test_the_promise_is_the_sum_by_hand(puzzle, priced, gpu_seconds, goal, precision, tmp_path):
    name = "tiny-fp8" if precision == "fp8" else "tiny"
    done = puzzle("solve", priced, *goal, "--gpu", "h100", "--tp", TP, "--shapes", name, *WORK, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    solved = read_architecture(tmp_path)
    assert (solved.tp, solved.costs["device"]) == (TP, "2 x a GPU")
    assert solved.costs["all_reduce"]["stands_in"] is None
    for predicted, layers in ((solved.predicted, solved.sub_blocks), (solved.parent_predicted, solved.parent.layers)):
        wanted = promise(solved, gpu_seconds, layers, predicted.batch, precision)
        for field, value in wanted.items():
            assert getattr(predicted, field) == pytest.approx(value, rel=1e-6), field
    assert solved.parent_predicted.num_parameters == solved.parent.num_parameters  # of all GPUs together
    assert "2 x a GPU" in done.output


def test_fewer_sub_blocks_save_their_sums(puzzle, priced, gpu_seconds, tmp_path):
    """One GPU's table says nothing of sums: at two, leaving a sub-block out pays more."""
    goal = ("--latency", "55%", "--gpu", "h100", *WORK, "--out", tmp_path)
    rows = read_all_reduces(priced / "costs" / "all_reduce" / "h100.csv")
    write_all_reduces(priced / "costs" / "all_reduce" / "h100.csv", [replace(row, seconds=1e-3) for row in rows])
    assert puzzle("solve", priced, *goal, "--shapes", "tiny").exit_code == 0
    alone = sum(isinstance(b, NoOp) for layer in read_architecture(tmp_path).sub_blocks for b in layer.values())
    assert puzzle("solve", priced, *goal, "--shapes", "tiny", "--tp", 2).exit_code == 0
    shared = sum(isinstance(b, NoOp) for layer in read_architecture(tmp_path).sub_blocks for b in layer.values())
    assert shared >= 4 > alone  # of eight sub-blocks and two ends half the sums have to go


def test_stages_precision_and_fusion_go_with_it(puzzle, priced, tmp_path):
    library = Library.open(priced)
    scores = priced / "scores"
    for path in scores.glob("*.json"):
        value = json.loads(path.read_text())
        for slot in ("attention", "ffn"):
            for name in ("parent@fp8", "parent@fp8-cache"):
                value["scores"][f"{slot}/{name}"] = {"kl": 1e-4}
        path.write_text(json.dumps(value))
    assert library.num_layers == 4
    also = ("--also", "16/4@2:ttft=100%")
    for more in (("--stages", 2, "--stage-tolerance", "60%"), ("--precision", "bf16,fp8"), ("--fusion",), also):
        named = () if "--precision" in more else ("--shapes", "tiny")
        done = puzzle(
            "solve", priced, "--latency", "60%", "--gpu", "h100", "--tp", 2, *named, *WORK, *more, "--out", tmp_path
        )
        assert done.exit_code == 0, done.output
        assert read_architecture(tmp_path).tp == 2


def test_a_table_of_shares_is_not_for_one_gpu(puzzle, one_line_error, priced, tmp_path):
    """Where the library has no other, the tables that ship are looked at."""
    next(priced.glob("costs/*/tiny.csv")).unlink()
    done = puzzle("solve", priced, "--latency", "80%", "--gpu", "h100", *WORK, "--out", tmp_path)
    one_line_error(done, "holds this library's sub-blocks: run `puzzle profile LIBRARY --gpu h100` on that machine")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "h100", "--tp", 3), "--tp 3: the GPUs of one host that share a model are 1, 2, 4, 8"),
        (("--gpu", "cpu", "--tp", 2), "--tp 2: shares are priced on GPUs, and --gpu is cpu"),
        (("--gpu", "h100", "--tp", 2, "--engine", "vllm"), "--tp 2 has no price with --engine vllm"),
        (
            ("--gpu", "h100", "--tp", 4),
            "`puzzle profile LIBRARY --gpu h100 --tp 4` on that machine",
        ),
        (("--gpu", "h100", "--tp", 4, "--shapes", "tiny"), "--shapes tiny-tp4: the cost tables for --gpu h100 are"),
        (("--gpu", "h100", "--tp", 8), "--tp 8: num_attention_heads 4 does not divide by it"),
    ],
)
def test_what_has_no_price_is_refused(puzzle, one_line_error, priced, options, words, tmp_path):
    one_line_error(puzzle("solve", priced, "--latency", "80%", *options, *WORK, "--out", tmp_path / "x"), words)
    assert not (tmp_path / "x").exists()


def test_a_missing_row_names_the_command(puzzle, one_line_error, priced):
    path = next(priced.glob("costs/*/tiny-tp2.csv"))
    kept = [line for line in path.read_text().splitlines(True) if "swiglu h32 f24" not in line]
    path.write_text("".join(kept))
    done = puzzle("solve", priced, "--latency", "80%", "--gpu", "h100", "--tp", 2, "--shapes", "tiny", *WORK)
    one_line_error(done, "has no 'swiglu h32 f24'", "run `puzzle profile LIBRARY --gpu h100 --tp 2` on that machine")


def test_variants_that_cannot_be_shared_are_left_out_and_said(puzzle, priced, tmp_path):
    facts = json.loads((priced / "library.json").read_text())
    for slots in facts["layers"].values():
        slots["ffn"]["0.75"] = "swiglu h32 f71"
    (priced / "library.json").write_text(json.dumps(facts))
    done = puzzle(
        "solve", priced, "--latency", "80%", "--gpu", "h100", "--tp", 2, "--shapes", "tiny", *WORK, "--out", tmp_path
    )
    assert done.exit_code == 0, done.output
    assert "2 GPUs cannot share ffn/0.75: left out" in done.stderr


def test_sums_that_were_not_measured(puzzle, one_line_error, priced, tmp_path, monkeypatch):
    """Those of a card with the same links stand in, and it is said; where there are none, the command is."""
    arguments = ("solve", priced, "--latency", "80%", "--tp", 2, "--shapes", "tiny", *WORK, "--out", tmp_path)
    monkeypatch.setattr("puzzle.choose.options.PACKAGED", tmp_path / "nothing")
    sums = priced / "costs" / "all_reduce" / "h100.csv"
    sums.rename(sums.with_name("h200.csv"))
    done = puzzle(*arguments, "--gpu", "h100")
    assert done.exit_code == 0, done.output
    said = done.stderr.replace("\n", " ")
    assert "all-reduces between 2 h100 were not measured: those of a GPU (2026-11-27)" in said
    assert read_architecture(tmp_path).costs["all_reduce"]["stands_in"] == "h100"
    (priced / "costs" / "h100-test").rename(priced / "costs" / "a100-test")
    one_line_error(
        puzzle(*arguments, "--gpu", "a100"),
        "--tp 2: no all-reduces between 2 of --gpu a100 were measured",
        "`torchrun --nproc-per-node 2 -m puzzle profile LIBRARY --gpu a100 --tp 2 --all-reduce`",
    )


def test_the_shipped_sums():
    """As measured, flat below the smallest, at the last bandwidth beyond the largest."""
    for tp in (2, 4, 8):
        found = find_all_reduces("h200", tp, [PACKAGED])
        assert all(found.seconds(size) == seconds for size, seconds in found.points)
        (smallest, least), *_, (before, less), (largest, most) = found.points
        times = [found.seconds(n) for n in (1, smallest, 10**5, 2**20, 2**23, largest, 2 * largest)]
        assert times == sorted(times)
        assert times[0] == times[1] == least
        assert (times[-1] - most) / largest == pytest.approx((most - less) / (largest - before))
    assert find_all_reduces("h200", 8, [PACKAGED]).seconds(2 * 16384) == pytest.approx(27.22e-6, rel=0.03)


def test_sums_that_take_less_for_more(tmp_path):
    """One that is slow between two fast ones stays alone; beyond a last one that is fast, time goes on with its bytes."""
    facts = {"tp": 2, "device": "NVIDIA H100", "versions": "1", "date": "2026-01-01"}
    times = {1024: 8e-6, 3072: 1.2e-5, 4096: 9e-6, 8192: 1e-5}
    found = [AllReduceRow(num_bytes=size, seconds=seconds, **facts) for size, seconds in times.items()]
    sums = AllReduces(tmp_path, 2, found)
    assert [sums.seconds(n) for n in (4096, 6144, 8192)] == pytest.approx([9e-6, 9.5e-6, 1e-5])
    assert AllReduces(tmp_path, 2, found[:3]).seconds(8192) == pytest.approx(1.8e-5)


def test_a_broken_table_of_sums_is_refused(puzzle, one_line_error, priced):
    path = priced / "costs" / "all_reduce" / "h100.csv"
    for text in ("tp,num_bytes\n2,7\n", path.read_text().replace("1e-06", "nan")):
        path.write_text(text)
        done = puzzle("solve", priced, "--latency", "80%", "--gpu", "h100", "--tp", 2, "--shapes", "tiny", *WORK)
        one_line_error(done, f"all-reduce table {path}", "measure it again")


def test_what_is_profiled_of_the_shares():
    structure = known_structure("llama-3.1-8b")
    subject = subject_named("llama-3.1-8b", structure, 8).share(8)
    assert subject.name == "llama-3.1-8b-tp8"
    keys = {sub_block.timed().key() for _, sub_block in subject.offered}
    assert {"gqa h4096 q4 kv1 d128", "swiglu h4096 f1792", "swiglu h4096 f192", "linear h4096 columns512"} <= keys
    assert subject.structure.vocab_size * 8 == 128256


def test_a_fused_ffn_saves_a_norm_and_a_sum(priced):
    """T of a share is affine here: what two FFNs have twice and their fusion once is its constant, with one sum over ranks."""
    table = CostTable(next(priced.glob("costs/*/tiny-tp2.csv")))
    sums = find_all_reduces("h100", TP, [priced / "costs"])
    costs, batch = CostModel(Library.open(priced), table, Workload(input_len=IN, output_len=OUT), sums), 4
    found = WideFfn(costs).change((96, 48), batch)
    constant = (32 + 40 * batch + 300) * 1e-8 + sum_seconds(2 * 32 * batch)
    assert found["decode_seconds"] == pytest.approx(-(OUT - 1) * constant, rel=1e-6)
    assert found["memory_bytes"] == -2 * 32
