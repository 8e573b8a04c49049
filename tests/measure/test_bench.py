"""`puzzle solve --gpu h100` from the shipped table, and `puzzle bench`, which on the CPU runs the same code without graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puzzle.blocklib.variant import parse_variant, search_space
from puzzle.measure.bench import fused_layers
from puzzle.parents.known import SHAPES
from puzzle.profile.cost_table import PACKAGED, CostTable
from puzzle.profile.gpu import GpuGrid, profile_shapes
from puzzle.runtime.fast import random_stack

SYNTHETIC = Path(__file__).parents[2] / "benchmarks" / "lib" / "synthetic_library.py"
GRID = GpuGrid(
    batches=(1, 2), contexts=(16, 64), rows=(32, 64), prompts=((1, 32), (2, 32)), wide=(), attention="kv2,kv1,window-1024,linear",
    seconds=1e-4, min_samples=1,
)  # fmt: skip


def synthetic(name: str, out: Path) -> Path:
    subprocess.run([sys.executable, SYNTHETIC, name, out], check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def solved(tmp_path_factory, puzzle) -> Path:
    """A library of the reference shapes with synthetic scores, profiled and solved here."""
    library = synthetic("reference", tmp_path_factory.mktemp("bench") / "lib")
    profile_shapes("reference", gpu="cpu", out=library / "costs" / "cpu", device="cpu", grid=GRID)
    work = ("--input-len", 32, "--output-len", 8)
    done = puzzle("solve", library, "--params", "80%", "--gpu", "cpu", *work, "--out", library / "solution")
    assert done.exit_code == 0, done.output
    assert "scores are synthetic" in done.output
    return library / "solution"


def test_the_shipped_table_needs_no_gpu(puzzle, tmp_path):
    library = synthetic("llama-3.1-8b", tmp_path / "lib")
    arguments = ("--gpu", "h100", "--input-len", 512, "--output-len", 256, "--json")
    done = puzzle("solve", library, "--throughput", "5x", *arguments)
    assert done.exit_code == 0, done.output
    assert "within the h100's 80 GB" in done.stderr
    found = json.loads(done.stdout)
    assert found["library"]["synthetic_scores"] is True
    assert found["predicted"]["speedup"] >= 5
    assert found["predicted"]["memory_bytes"] <= 80e9
    assert found["parent_predicted"]["memory_bytes"] <= 80e9
    same = json.loads(puzzle("solve", library, "--throughput", "5x", "--same-batch", *arguments).stdout)
    assert same["predicted"]["speedup_at_same_batch"] >= 5
    assert same["objective"] <= found["objective"]
    named = ("--shapes", "llama-3.1-8b-fp8", *arguments)
    fp8 = json.loads(puzzle("solve", library, "--throughput", "5x", *named).stdout)
    assert fp8["parent_predicted"]["tokens_per_second"] > found["parent_predicted"]["tokens_per_second"]
    done = puzzle("solve", library, "--throughput", "5x", *arguments, "--memory", "9GB")
    assert json.loads(done.stdout)["predicted"]["memory_bytes"] <= 9e9


@pytest.mark.parametrize("name", ["llama-3.3-70b", "llama-3.1-405b-tp8", "qwen3-8b", "reference"])
def test_every_shipped_parent_can_be_solved_for(puzzle, tmp_path, name):
    library = synthetic(name, tmp_path / "lib")
    arguments = ("--throughput", "2x", "--gpu", "h100", "--input-len", 256, "--output-len", 128, "--json")
    found = json.loads(puzzle("solve", library, *arguments).stdout)
    assert found["predicted"]["speedup"] >= 2
    assert found["predicted"]["memory_bytes"] <= 80e9
    assert found["predicted"]["workspace_bytes"] > 0
    assert found["extrapolated"] == []


def test_a_fused_architecture_runs_fused(puzzle, tmp_path):
    """What `solve --fusion` prices as one wide FFN is measured as one, and holds as many parameters as it says."""
    library = synthetic("reference", tmp_path / "lib")
    arguments = ("--throughput", "3x", "--fusion", "--gpu", "h100", "--input-len", 128, "--output-len", 64, "--json")
    solved = json.loads(puzzle("solve", library, *arguments).stdout)
    assert solved["fuse"]
    shapes = SHAPES["reference"]
    layers = fused_layers(shapes, solved)
    assert len(layers) == shapes.num_layers - sum(last - first for first, last in solved["fuse"])
    stack = random_stack(shapes, layers, "cpu", torch.float32)
    assert stack.num_bytes == 4 * solved["predicted"]["num_parameters"]
    # in bf16: weights, caches, and the workspace of the widest FFN, which is wider than any of the library's
    predicted, work = solved["predicted"], solved["workload"]
    tokens = predicted["batch"] * (work["input_len"] + work["output_len"])
    held = 2 * predicted["num_parameters"] + predicted["kv_bytes_per_token"] * tokens
    width = max(int(layer["ffn"][1:]) for layer in layers if layer["ffn"].startswith("f"))
    needs = 16384 * 2 * (3 * width)  # gate, up and their product
    assert width > 2 * shapes.spec.intermediate_size
    assert predicted["workspace_bytes"] >= needs
    assert predicted["memory_bytes"] >= held + needs


def test_shipped_tables_hold_what_a_library_has_by_default():
    tables = [t for t in (PACKAGED / "h100-sxm-80gb").glob("*.csv") if not t.stem.endswith("-fp8")]
    assert {t.stem for t in tables} == set(SHAPES)
    for path in tables:
        shapes, table = SHAPES[path.stem], CostTable(path)
        for kind, names in search_space(shapes.spec, None, None).items():
            found = {parse_variant(kind, name, shapes.spec).shape(shapes.spec) for name in names} - {"none"}
            assert found <= set(table.shapes(kind)), path.stem


def test_what_lies_beyond_the_measured_points_is_said(puzzle, tmp_path):
    library = synthetic("reference", tmp_path / "lib")
    arguments = (library, "--throughput", "2x", "--gpu", "h100", "--input-len", 40, "--output-len", 20)
    found = json.loads(puzzle("solve", *arguments, "--json").stdout)
    batch = found["predicted"]["batch"]
    said = f"decode of attention 'h256 q8 kv4 d32', batch {batch}, tokens 40 to 58 (measured: 128 to 1024)"
    assert said in found["extrapolated"]
    assert f"extrapolated: {said}" in puzzle("solve", *arguments).output.replace("\n", "")


def test_a_parent_that_does_not_fit_is_said_to_be_so(puzzle, tmp_path):
    library = synthetic("llama-3.3-70b", tmp_path / "lib")
    done = puzzle("solve", library, "--throughput", "3x", "--gpu", "h100", "--input-len", 256, "--output-len", 128)
    assert "the parent itself needs 131" in done.output


def test_a_library_that_no_table_covers(puzzle, library, tmp_path):
    done = puzzle("solve", library, "--throughput", "2x", "--gpu", "h100", "--out", tmp_path / "other")
    assert done.exit_code == 2, done.output
    assert "holds this library's shapes: run `puzzle profile LIBRARY --gpu h100`" in done.stderr.replace("\n", " ")


def test_promised_and_delivered_side_by_side(puzzle, solved):
    done = puzzle("bench", solved, "--gpu", "cpu", "--shapes", "reference", "--with-parent", "--repeats", 1, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    promised = json.loads((solved / "architecture.json").read_text())
    assert found["child"]["predicted"]["tokens_per_second"] == promised["predicted"]["tokens_per_second"]
    assert found["child"]["measured"]["batch"] == promised["predicted"]["batch"]
    assert found["speedup"]["measured"] > 0
    pages = (
        16 * 2 * 2 * 4 * 64 * 32 * 4 * promised["predicted"]["batch"]
    )  # at most: layers, k and v, heads, page, head_dim
    assert abs(found["child"]["measured"]["memory_bytes"] - found["child"]["predicted"]["memory_bytes"]) <= pages


def test_a_checkpoint(puzzle, parent):
    arguments = ("--gpu", "cpu", "--input-len", 8, "--output-len", 4, "--batch", 2, "--repeats", 1)
    done = puzzle("bench", parent, *arguments)
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.output


def test_bad_requests(puzzle, solved, parent, tmp_path):
    for arguments, message in (
        ((tmp_path, "--gpu", "cpu"), "is neither a checkpoint nor an architecture"),
        ((solved, "--gpu", "cpu"), "an architecture needs --shapes"),
        ((solved, "--gpu", "cpu", "--shapes", "llama-3.1-8b"), "the architecture has 16 layers and --shapes 32"),
        ((parent, "--gpu", "cpu"), "has no architecture.json with a workload"),
        ((parent, "--gpu", "cpu", "--input-len", 8), "--input-len and --output-len go together"),
        ((parent, "--gpu", "cpu", "--input-len", 8, "--output-len", 4, "--batch", 0), "--batch 0: must be above 0"),
        ((solved, "--gpu", "h100", "--shapes", "reference"), "no CUDA device can be used here"),
    ):
        done = puzzle("bench", *arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr.replace("\n", " "), done.stderr
