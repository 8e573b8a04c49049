"""`solve --hidden --depth`: the local problem at each global point, against the points by themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields

import pytest

from puzzle.base.files import json_text
from puzzle.choose.options import SolveOptions
from puzzle.library.manifest import Library
from puzzle.measure.architecture import read_architecture
from puzzle.parents.opened import open_model
from puzzle.profile.engine import Constants, EngineModel

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16, "--json")
SIZES = ("--seq-len", 32, "--calibration-sequences", 4, "--device", "cpu")
PROFILE = ("--batches", "1,4", "--prefill", 16, "--contexts", "16,32", "--seconds", 0.005, "--rounds", 1)


@pytest.fixture(scope="module")
def point(tmp_path_factory, puzzle, parent, corpus, fake_costs):
    """The library of the tiny parent with 24 hidden channels and 3 layers, named "small". Not to be changed."""
    out = tmp_path_factory.mktemp("points") / "small"
    for words in (
        ("slice", parent, "--hidden", 24, "--depth", 3, "--data", corpus, "--out", out / "parent", "--score-sequences", 4, *SIZES),
        ("build-library", out / "parent", "--data", corpus, "--out", out, "--tokens", 0, "--score-sequences", 4,
         "--validation-sequences", 2, "--attention", "kv1,none", "--ffn", "0.5,none", *SIZES),
        ("profile", out, "--gpu", "cpu", *PROFILE),
    ):  # fmt: skip
        done = puzzle(*words)
        assert done.exit_code == 0, (done.output, done.exception)
    fake_costs(out)
    return out


@pytest.fixture
def both(own_library, point):
    shutil.copytree(point, own_library / "points" / "small")
    return own_library


def solved(puzzle, *words) -> dict:
    done = puzzle("solve", *words, *SOLVE)
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("goal", "best"),
    [
        (("--throughput", "2.2x"), "hidden 32, depth 4"),
        (("--latency", "70%"), "hidden 32, depth 4"),
        (("--params", "35%"), "hidden 24, depth 3"),
    ],
)
def test_the_best_of_all_points(puzzle, both, tmp_path, goal, best):
    """Each point's score is its own solution's at the same absolute limit, plus what slicing cost; the best is written where its library is."""
    found = solved(puzzle, both, *goal, "--hidden", "24,32")
    small, out = both / "points" / "small", ("--out", tmp_path / "alone")
    whole = solved(puzzle, both, *goal, *out)
    kl = json.loads((small / "parent" / "slice.json").read_text())["point"]["kl"]
    parent = whole["parent_predicted"]
    limit = {
        "--throughput": 1 / parent["tokens_per_second"],
        "--params": parent["num_parameters"],
        "--latency": parent["latency_seconds"],
    }
    number = float(goal[1].strip("x%"))
    absolute = number / limit[goal[0]] if goal[0] == "--throughput" else number / 100 * limit[goal[0]]
    fixed = () if goal[0] == "--throughput" else ("--concurrency", parent["batch"])
    alone = solved(puzzle, small, goal[0], repr(absolute), *fixed, *out)
    wanted = {"hidden 32, depth 4": whole["objective"], "hidden 24, depth 3": alone["objective"] + kl}
    assert {one["sizes"]: one["objective"] for one in found["points"]} == pytest.approx(wanted)
    assert found["objective"] == pytest.approx(min(wanted.values()))
    assert found["parent_predicted"] == whole["parent_predicted"]
    assert min(wanted, key=wanted.__getitem__) == best
    assert (found["point"] is None) == (best == "hidden 32, depth 4")
    place = both if found["point"] is None else small
    assert json.loads(json_text(read_architecture(place / "solution").to_json())) == found


def test_a_sliced_child_goes_down_the_road(puzzle, both, parent, corpus, tmp_path, one_line_error):
    """With one point alone: exported from its library, measured beside the whole parent, in speed too, healed by it."""
    found, small = solved(puzzle, both, "--throughput", "2x", "--hidden", 24, "--depth", 3), both / "points" / "small"
    assert found["speedup"] >= 2
    assert found["whole"] == json.loads((both / "library.json").read_text())["structure"]
    done = puzzle("export", small, small / "solution", "--out", tmp_path / "child")
    assert done.exit_code == 0, (done.output, done.exception)
    assert open_model(tmp_path / "child").structure.hidden_size == 24
    again = puzzle("rescore", small, small / "solution", "--gpu", "cpu", "--data", corpus, "--out", tmp_path / "again")
    one_line_error(again, "was solved with --hidden or --depth, which is not scored anew")
    evaluated = (
        "--data",
        corpus,
        "--sequences",
        2,
        "--seq-len",
        32,
        "--input-len",
        16,
        "--output-len",
        4,
        "--repeats",
        1,
    )
    done = puzzle("evaluate", parent, tmp_path / "child", *evaluated, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["child"]["kl"] > 0
    heal = (
        "--teacher",
        parent,
        "--data",
        corpus,
        "--tokens",
        128,
        "--seq-len",
        16,
        "--batch-size",
        4,
        "--device",
        "cpu",
    )
    one_line_error(puzzle("heal", tmp_path / "child", *heal, "--out", tmp_path / "healed"), "pass --cosine-weight 0")
    done = puzzle("heal", tmp_path / "child", *heal, "--out", tmp_path / "healed", "--cosine-weight", 0)
    assert done.exit_code == 0, (done.output, done.exception)
    done = puzzle("bench", small / "solution", "--with-parent", "--gpu", "cpu", "--repeats", 1, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    shown = puzzle("solve", both, "--throughput", "2x", "--hidden", "24,32", *SOLVE[:-1])
    assert "of which slicing" in shown.stderr + shown.stdout


def test_an_engine_prices_all_points_by_one_fit(both):
    constants = Constants(**{field.name: 0.5 for field in fields(Constants)})
    whole, library = EngineModel("vllm", "h100", constants), Library.open(both / "points" / "small")
    ((_, priced),) = SolveOptions(engine="vllm").priced([library], "h100", whole)
    assert priced.hash == whole.hash
    assert priced.parent == (library.structure, library.structure.usual)
    assert whole.parent is None


def test_refusals(puzzle, both, one_line_error, tmp_path):
    small = both / "points" / "small"
    missing = puzzle("solve", both, "--throughput", "2x", "--hidden", "24,32", "--depth", "3,4", *SOLVE)
    one_line_error(
        missing,
        "no library for --hidden 24 and --depth 4 (there are 32 x 4, 24 x 3)",
        "puzzle slice PARENT --hidden 24 --depth 4",
    )
    one_line_error(puzzle("solve", both, "--throughput", "2x", "--hidden", "16", *SOLVE), "no library for --hidden 16")
    one_line_error(
        puzzle("solve", both, "--throughput", "2x", "--depth", "0", *SOLVE), "--depth 0: write positive integers"
    )
    one_line_error(
        puzzle("solve", small, "--throughput", "2x", "--depth", "3", *SOLVE),
        "is of a sliced parent (hidden 24, depth 3)",
    )
    hopeless = puzzle("solve", both, "--params", "10", "--hidden", "24,32", *SOLVE)
    one_line_error(
        hopeless, "no child was found at any point; at the smallest (hidden 24, depth 3): ", "--params 10 cannot be met"
    )
    shutil.rmtree(small / "costs")
    one_line_error(
        puzzle("solve", both, "--throughput", "2x", "--depth", "3", *SOLVE),
        f"library {small}: no cost table for --gpu cpu",
    )
    facts = json.loads((small / "library.json").read_text())
    facts["parent"]["point"]["fingerprint"] = "0" * 64
    (small / "library.json").write_text(json.dumps(facts))
    one_line_error(
        puzzle("solve", both, "--throughput", "2x", "--depth", "3", *SOLVE),
        "is not of a parent that was sliced from tiny",
    )
