"""`puzzle bench`: what was promised beside what is delivered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from puzzle.blocklib.variant import search_spaces
from puzzle.parents.known import known_structure
from puzzle.profile.grid import Grid
from puzzle.profile.profile import Subject, profile

GRID = Grid(
    batches=(1, 2), contexts=(16, 64), rows=(32, 64), prompts=((1, 32), (2, 32)), by_rows=True,
    seconds=1e-4, min_samples=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def solved(tmp_path_factory, puzzle, synthetic) -> Path:
    """A library of the reference shapes with synthetic scores, profiled and solved here."""
    library = shutil.copytree(synthetic("reference"), tmp_path_factory.mktemp("bench") / "lib")
    structure = known_structure("reference")
    space = search_spaces({0: structure.layers[0]}, {"attention": "kv2,kv1,window-1024,linear"})[0]
    offered = tuple((slot, sub_block) for slot, names in space.items() for sub_block in names.values())
    subject = Subject(name="reference", structure=structure, offered=offered)
    profile(subject, gpu="h100", out=library / "costs" / "cpu", device="cpu", grid=GRID)
    work = ("--input-len", 32, "--output-len", 8)
    done = puzzle("solve", library, "--params", "80%", "--gpu", "cpu", *work, "--out", library / "solution")
    assert done.exit_code == 0, done.output
    assert "scores are synthetic" in done.output
    return library / "solution"


def test_promised_and_delivered_side_by_side(puzzle, solved):
    done = puzzle("bench", solved, "--gpu", "cpu", "--with-parent", "--repeats", 1, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    promised = json.loads((solved / "architecture.json").read_text())
    assert found["child"]["predicted"]["tokens_per_second"] == promised["predicted"]["tokens_per_second"]
    assert found["parent"]["predicted"]["tokens_per_second"] == promised["parent_predicted"]["tokens_per_second"]
    assert found["child"]["measured"]["batch"] == promised["predicted"]["batch"]
    assert found["parent"]["measured"]["batch"] == promised["parent_predicted"]["batch"]
    assert found["speedup"]["measured"] > 0
    assert found["speedup"]["predicted"] == promised["speedup"]
    for who in ("child", "parent"):
        assert found[who]["measured"]["memory_bytes"] == found[who]["predicted"]["memory_bytes"]


def test_another_device_has_no_prediction(puzzle, solved, tmp_path):
    """What was promised for one machine is not held against another."""
    value = json.loads((solved / "architecture.json").read_text())
    value["costs"]["device"] = "a card of long ago"
    (tmp_path / "architecture.json").write_text(json.dumps(value))
    done = puzzle("bench", tmp_path, "--gpu", "cpu", "--repeats", 1, "--json")
    assert done.exit_code == 0, done.output
    assert "promised for a card of long ago, measured on" in done.stderr.replace("\n", " ")
    assert json.loads(done.stdout)["child"]["predicted"] is None


def test_another_workload_has_no_prediction(puzzle, solved):
    """Shapes come from the architecture; what it promised was for its own workload, and is not held against another."""
    work = ("--input-len", 16, "--output-len", 4, "--batch", 2, "--repeats", 1)
    found = json.loads(puzzle("bench", solved, "--gpu", "cpu", *work, "--with-parent", "--json").stdout)
    assert found["workload"] == {"input_len": 16, "output_len": 4}
    assert found["child"]["predicted"] is found["parent"]["predicted"] is found["speedup"]["predicted"] is None
    assert found["child"]["measured"]["batch"] == found["parent"]["measured"]["batch"] == 2


def test_a_checkpoint(puzzle, parent):
    arguments = ("--gpu", "cpu", "--input-len", 8, "--output-len", 4, "--batch", 2, "--repeats", 1)
    done = puzzle("bench", parent, *arguments)
    assert done.exit_code == 0, done.output
    assert "tokens/s" in done.output


def test_bad_requests(puzzle, solved, parent, tmp_path):
    for arguments, message in (
        ((tmp_path, "--gpu", "cpu"), "is neither a checkpoint nor an architecture"),
        ((parent, "--gpu", "cpu"), "has no architecture.json with a workload"),
        ((parent, "--gpu", "cpu", "--input-len", 8), "--input-len and --output-len go together"),
        ((parent, "--gpu", "cpu", "--input-len", 8, "--output-len", 4, "--batch", 0), "--batch 0: must be above 0"),
        (
            (parent, "--gpu", "cpu", "--input-len", 8, "--output-len", 4, "--with-parent"),
            "--with-parent needs an architecture: bench a parent's checkpoint by itself",
        ),
        ((solved, "--gpu", "cpu", "--fp8"), "precision fp8 has no runtime on a CPU"),
        ((solved, "--gpu", "b200"), "no CUDA device can be used here"),
    ):
        done = puzzle("bench", *arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr.replace("\n", " "), done.stderr
