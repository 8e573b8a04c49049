"""A mixture-of-experts parent on the road: what a solver may choose of it, and what a token uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from puzzle.library.manifest import Library
from puzzle.parents.known import STRUCTURES
from tiny_parents import write_tiny_parent

FFN = "experts=4,experts=3-topk=1,topk=2,width=16,dense=24,none,0.5"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, parent, corpus, puzzle) -> Path:
    """A library of a tiny Qwen3-MoE whose layer 2 is dense, with its costs on this CPU."""
    root = tmp_path_factory.mktemp("mixed")
    write_tiny_parent("qwen3_moe", root / "parent")
    for file in parent.glob("token*"):
        (root / "parent" / file.name).write_bytes(file.read_bytes())
    build = (
        "--tokens",
        256,
        "--seq-len",
        32,
        "--batch-size",
        2,
        "--calibration-sequences",
        2,
        "--validation-sequences",
        2,
    )
    grid = ("--batches", 1, "--prefill", 16, "--contexts", "16,32", "--seconds", 0.001, "--rounds", 1)
    for arguments in (
        (
            "build-library",
            root / "parent",
            "--data",
            corpus,
            "--out",
            root / "lib",
            *build,
            "--score-sequences",
            2,
            "--attention",
            "kv1",
            "--ffn",
            FFN,
        ),
        ("profile", root / "lib", "--gpu", "cpu", *grid),
    ):
        done = puzzle(*arguments)
        assert done.exit_code == 0, done.output
    return root / "lib"


def test_layers_offer_what_they_can(mixed):
    spaces = Library.open(mixed).spaces
    assert list(spaces[2]["ffn"]) == ["parent", "none", "0.5"]
    assert list(spaces[1]["ffn"]) == [
        "parent",
        "experts=4",
        "experts=3-topk=1",
        "topk=2",
        "width=16",
        "dense=24",
        "none",
    ]


def test_records_have_the_load_of_experts(mixed):
    for path in mixed.glob("blocks/*/ffn/*.json"):
        record, count = json.loads(path.read_text()), {"e": 5, "experts=4": 4, "experts=3-topk=1": 3}
        if path.stem in ("dense=24", "none", "0.5"):
            assert "expert_load" not in record
            continue
        assert len(record["expert_load"]) == count.get(path.stem, 5), path
        assert sum(record["expert_load"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("share", [85, 70])
def test_what_a_token_uses_is_a_limit(mixed, puzzle, tmp_path, share):
    done = puzzle(
        "solve",
        mixed,
        "--gpu",
        "cpu",
        "--active-params",
        f"{share}%",
        "--input-len",
        16,
        "--output-len",
        16,
        "--out",
        tmp_path,
    )
    assert done.exit_code == 0, done.output
    assert "of which a token uses" in done.output
    found = json.loads((tmp_path / "architecture.json").read_text())
    child, parent = found["predicted"], found["parent_predicted"]
    assert parent["active_parameters"] < parent["num_parameters"]
    assert child["active_parameters"] <= share / 100 * parent["active_parameters"]
    structure = Library.open(mixed).structure
    active = structure.num_fixed_parameters + sum(b.active_parameters() for _, _, b in structure)
    assert parent["active_parameters"] == active


def test_an_engine_that_nobody_fitted_for_experts_is_refused(mixed, puzzle, one_line_error):
    done = puzzle(
        "solve", mixed, "--engine", "vllm", "--gpu", "h100", "--params", "80%", "--input-len", 16, "--output-len", 16
    )
    one_line_error(done, "sub-blocks of kind 'moe' have not been fitted")


def test_qwen3_30b_a3b():
    structure = STRUCTURES["qwen3-30b-a3b"]
    active = structure.num_fixed_parameters + sum(b.active_parameters() for _, _, b in structure)
    assert (round(structure.num_parameters / 1e9, 1), round(active / 1e9, 1)) == (30.5, 3.4)
