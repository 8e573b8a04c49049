"""The cost tables that ship with the package, and what `puzzle solve` says from them without a GPU."""

from __future__ import annotations

import json

import pytest

from puzzle.base.machine import gpu_facts
from puzzle.blocklib.variant import search_spaces
from puzzle.measure.architecture import read_architecture
from puzzle.parents.known import STRUCTURES
from puzzle.profile.cost_table import PACKAGED, CostTable
from puzzle.profile.parts import ends_of, priced_as


def test_the_shipped_table_needs_no_gpu(puzzle, synthetic, tmp_path):
    library = synthetic("llama-3.1-8b")
    arguments = ("--gpu", "h100", "--input-len", 512, "--output-len", 256, "--json", "--out", tmp_path)
    done = puzzle("solve", library, "--throughput", "5x", *arguments)
    assert done.exit_code == 0, done.output
    assert "within the h100's 84 GB" in done.stderr
    found = json.loads(done.stdout)
    assert found["synthetic_scores"] is True
    assert found["speedup"] >= 5
    assert found["predicted"]["memory_bytes"] <= 84e9
    assert found["parent_predicted"]["memory_bytes"] <= 84e9
    same = json.loads(puzzle("solve", library, "--throughput", "5x", "--same-batch", *arguments).stdout)
    assert same["speedup_at_same_batch"] >= 5
    assert same["objective"] <= found["objective"]
    named = ("--shapes", "llama-3.1-8b-fp8", *arguments)
    fp8 = json.loads(puzzle("solve", library, "--throughput", "5x", *named).stdout)
    assert fp8["parent_predicted"]["tokens_per_second"] > found["parent_predicted"]["tokens_per_second"]
    assert {choice["precision"] for layer in fp8["layers"] for choice in layer.values()} == {"fp8"}
    done = puzzle("solve", library, "--throughput", "5x", *arguments, "--memory", "9GB")
    assert json.loads(done.stdout)["predicted"]["memory_bytes"] <= 9e9


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        *((name, "h100") for name in ("llama-3.3-70b", "llama-3.1-405b-tp8", "qwen3-8b", "reference")),
        *((name, "h200") for name in ("nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "qwen3-30b-a3b")),
    ],
)
def test_every_shipped_parent_can_be_solved_for(puzzle, synthetic, name, gpu, tmp_path):
    arguments = ("--throughput", "2x", "--gpu", gpu, "--input-len", 256, "--output-len", 128, "--json")
    found = json.loads(puzzle("solve", synthetic(name), *arguments, "--out", tmp_path).stdout)
    assert found["speedup"] >= 2
    assert found["predicted"]["memory_bytes"] <= gpu_facts(gpu).memory_bytes
    assert found["predicted"]["workspace_bytes"] > 0
    assert found["extrapolated"] == []


def test_shipped_tables_hold_what_a_library_has_by_default():
    tables = [t for t in PACKAGED.glob("h[12]00-*/*.csv") if not t.stem.endswith("-fp8")]
    without = {
        name for name in STRUCTURES if name.startswith(("nemotron-nano-12b", "smollm2", "gpt-oss"))
    }  # a hybrid, one for engines, a mixture
    assert set(STRUCTURES) - without <= {t.stem for t in tables} <= set(STRUCTURES)
    for path in tables:
        structure, table = STRUCTURES[path.stem], CostTable(path)
        spaces = search_spaces(dict(enumerate(structure.layers)), {})
        offered = {b for slots in spaces.values() for space in slots.values() for b in space.values() if b.tensors()}
        assert {priced_as(part) for part in (*offered, *ends_of(structure))} <= set(table.parts()), path.stem


def test_what_lies_beyond_the_measured_points_is_said(puzzle, synthetic, tmp_path):
    arguments = (synthetic("reference"), "--throughput", "2x", "--gpu", "h100", "--input-len", 40, "--output-len", 20)
    found = json.loads(puzzle("solve", *arguments, "--json", "--out", tmp_path).stdout)
    batch = found["predicted"]["batch"]
    said = f"decode of 'gqa h256 q8 kv4 d32', batch {batch}, tokens 40 to 58 (measured: 128 to 1024)"
    assert said in found["extrapolated"]
    assert f"extrapolated: {said}" in puzzle("solve", *arguments, "--out", tmp_path).output.replace("\n", "")


def test_a_parent_that_does_not_fit_is_said_to_be_so(puzzle, synthetic, tmp_path):
    arguments = ("--throughput", "3x", "--gpu", "h100", "--input-len", 256, "--output-len", 128)
    done = puzzle("solve", synthetic("llama-3.3-70b"), *arguments, "--out", tmp_path)
    assert "the parent itself needs 131" in done.output


def test_a_library_that_no_table_covers(puzzle, library, tmp_path):
    done = puzzle("solve", library, "--throughput", "2x", "--gpu", "h100", "--out", tmp_path / "other")
    assert done.exit_code == 2, done.output
    assert "holds this library's sub-blocks: run `puzzle profile LIBRARY --gpu h100`" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("rule", ["greedy", "no-op"])
def test_a_baseline_proves_nothing(puzzle, synthetic, rule, tmp_path):
    """Its bound and gap are null; what is written is JSON to the letter, and is read back."""
    arguments = ("--throughput", "3x", "--gpu", "h100", "--input-len", 256, "--output-len", 128, "--out", tmp_path)
    goal = ("solve", synthetic("reference"), *arguments, "--baseline", rule)
    assert "nothing proven" in puzzle(*goal).output
    done = puzzle(*goal, "--json")
    assert done.exit_code == 0, done.output
    for text in (done.stdout, (tmp_path / "architecture.json").read_text()):
        found = json.loads(text, parse_constant=pytest.fail)
        assert (found["status"], found["bound"], found["gap"]) == ("feasible", None, None)
    assert read_architecture(tmp_path).bound is None
