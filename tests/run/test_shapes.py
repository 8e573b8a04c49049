"""Recipes of parents that are not there: a dry run computes what every stage takes, and says that it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from puzzle.base.machine import GPUS
from puzzle.blocklib.variant import search_spaces
from puzzle.library.plan import forward_flops, training_flops
from puzzle.parents.known import known_structure
from puzzle.run.shapes import MFU

EXAMPLES = Path(__file__).parents[2] / "examples"
SEEDS = ("llama_70b_one_h100", "llama_405b_eight_h100")


@pytest.mark.parametrize("name", SEEDS)
def test_a_dry_run_needs_no_checkpoint(puzzle, name, tmp_path):
    path = EXAMPLES / f"{name}.yaml"
    done = puzzle("run", path, "--out", tmp_path / "run", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    found, recipe = json.loads(done.stdout), yaml.safe_load(path.read_text())
    structure, stages = known_structure(recipe["parent"]), found["stages"]
    assert (found["shapes"], found["gpu"], found["mfu"]) == (recipe["parent"], "h100", MFU)
    spaces = search_spaces(dict(enumerate(structure.layers)), {n: recipe["build"].get(n) for n in ("attention", "ffn")})
    each = sum(training_flops(structure.layers[i], space, 8192, False) for i, space in spaces.items())
    steps = -(-int(float(recipe["build"]["tokens"])) // (8192 * 4))
    hours = steps * 8192 * 4 * each / (MFU * 989e12) / 3600
    assert stages["build-library"]["gpu_hours"] == pytest.approx(hours)
    assert found["activation_bytes"] == steps * 8192 * 4 * structure.hidden_size * 2
    assert stages["child"]["disk_bytes"] == 2 * structure.num_parameters
    assert stages["heal"]["memory_bytes"] == 18 * structure.num_parameters
    held_out = (
        recipe["evaluate"]["sequences"] * recipe["evaluate"]["seq_len"]
    )  # the whole parent, however many GPUs share it to serve
    passed = sum(forward_flops(b, 8192) for _, _, b in structure) + 2 * structure.vocab_size * structure.hidden_size
    assert stages["evaluate"]["gpu_hours"] == pytest.approx(3 * held_out * passed / (MFU * 989e12) / 3600, rel=1e-3)
    card = GPUS["h100"].memory_bytes
    assert stages["heal"]["gpus"] == -(-stages["heal"]["memory_bytes"] // card) > 1
    alone = {"profile"} | {one for one in stages if "passes" in stages[one]}
    assert alone == {"profile", "score", "evaluate"} | ({"fuse"} & stages.keys())
    for one in alone:  # whatever the parent's size: read layer by layer
        assert (stages[one]["gpus"], stages[one]["memory_bytes"] <= card) == (1, True)
    assert stages["evaluate"]["passes"] == 1 < stages["score"]["passes"]
    too_large = "405b" in name  # one layer with its variants
    assert (stages["build-library"]["memory_bytes"] > card, stages["build-library"]["gpus"]) == (
        too_large,
        None if too_large else 1,
    )
    assert not (tmp_path / "run").exists()
    shown = puzzle("run", path, "--out", tmp_path / "run", "--dry-run").output.replace("\n", " ")
    assert "by its shapes alone: computed, nothing measured here" in shown
    assert ("one layer with its variants does not fit a GPU's 78.2 GiB" in shown) is too_large


def test_what_fits_is_whole(puzzle, tmp_path):
    """An 8B parent is, in scores; beside its child it needs no second GPU either. A limit holds in each stage, and where nothing
    can go through the stage says so by its recipe's keys."""
    path = tmp_path / "recipe.yaml"
    recipe = {"parent": "llama-3.1-8b", "profile": {"gpu": "h100"}, "goal": {"latency": "60%"}}

    def planned(**sections):
        path.write_text(yaml.safe_dump(recipe | sections))
        return puzzle("run", path, "--out", tmp_path / "run", "--dry-run", "--json")

    stages = json.loads(planned().stdout)["stages"]
    assert {stages[name]["passes"] for name in ("score", "evaluate")} == {None}
    stages = json.loads(planned(evaluate={"memory_limit": 20 * 10**9}).stdout)["stages"]
    assert (stages["score"]["passes"], stages["evaluate"]["passes"]) == (None, 1)
    assert stages["evaluate"]["memory_bytes"] < 20e9
    fp8 = json.loads(planned(solve={"precision": "bf16,fp8"}).stdout)["stages"]
    assert fp8["score"]["seconds"] > stages["score"]["seconds"]
    done = planned(evaluate={"memory_limit": 10**9})
    assert done.exit_code == 2
    assert "use fewer evaluate.sequences, a smaller evaluate.seq_len or a larger evaluate.memory_limit" in done.stderr


def test_a_screen_spares_scores(puzzle, tmp_path):
    """The share that it leaves out is of the passes of all variants, and the screen itself is counted; with nothing left out it only costs."""
    path = tmp_path / "recipe.yaml"

    def score(**options):
        recipe = {"parent": "llama-3.1-8b", "profile": {"gpu": "h100"}, "goal": {"latency": "60%"}}
        path.write_text(yaml.safe_dump(recipe | {"score": {"sequences": 640, "seq_len": 1024, **options}}))
        done = puzzle("run", path, "--out", tmp_path / "run", "--dry-run", "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["stages"]["score"]

    structure = known_structure("llama-3.1-8b")
    layers = sum(forward_flops(sub_block, 1024) for _, _, sub_block in structure)
    each = (layers + 2 * structure.vocab_size * structure.hidden_size) * 1024 / (MFU * 989e12)
    alone = 0.0
    for joint in (False, True):
        plain, none, half = (
            score(joint=joint, **some) for some in ({}, {"sub_block_screen": 0}, {"sub_block_screen": 0.5})
        )
        screen = none["seconds"] - plain["seconds"]
        assert 16 * 3 * each < screen < 16 * 8 * each
        passes = plain["seconds"] / (640 * each) - 1
        alone = alone or passes  # of a pair, either block may be left out
        left = 0.5 * alone + 0.25 * (passes - alone)
        assert half["seconds"] == pytest.approx(screen + 640 * each * (1 + left), abs=0.2)
        assert half["memory_bytes"] == none["memory_bytes"] >= plain["memory_bytes"]


def test_the_road_itself_needs_the_checkpoint(puzzle, one_line_error, tmp_path, corpus):
    done = puzzle("run", EXAMPLES / f"{SEEDS[0]}.yaml", "--data", corpus, "--out", tmp_path / "run")
    one_line_error(done, "parent llama-3.3-70b is the name of known shapes", "--dry-run alone")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"solve": {"tp": 3}}, "solve.tp 3: the GPUs of one host"),
        ({"solve": {"tp": 2, "engine": "vllm"}}, "solve.tp 2 has no price with solve.engine vllm"),
        (
            {"profile": {"gpu": "a100"}, "solve": {"tp": 2}},
            "no all-reduces between 2 of profile.gpu a100 were measured",
        ),
        ({"goal": {"latency": "60%", "pinned": "200"}}, "goal.pinned 200"),
    ],
)
def test_what_can_be_seen_to_be_wrong_is_refused(puzzle, one_line_error, tmp_path, change, words):
    recipe = {"parent": "llama-3.1-8b", "profile": {"gpu": "h100"}, "goal": {"latency": "60%"}} | change
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    one_line_error(puzzle("run", path, "--out", tmp_path / "run", "--dry-run"), words)
