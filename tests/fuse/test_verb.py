"""`puzzle fuse` and `puzzle solve --fusion` on the command line; bad input in one line with exit code 2."""

from __future__ import annotations

import json

import pytest

from puzzle.export.sources import child_of_checkpoint

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)
TEXT = ("--sequences", 2, "--seq-len", 32)


def test_runs_chosen_on_text_and_evaluated(puzzle, one_line_error, fusible, parent, corpus, tmp_path):
    """A child of 11 layers becomes one of 8, is measured beside its parent of 4, and can be fused no further."""
    out, picture = tmp_path / "fused", tmp_path / "map.png"
    options = ("--data", corpus, *TEXT, "--max-dependency", 2, "--parallel-blocks", "--heat-map", picture, "--json")
    dry = puzzle("fuse", fusible, *options, "--dry-run")
    assert dry.exit_code == 0, (dry.output, dry.exception)
    planned = json.loads(dry.stdout)
    assert not out.exists()
    done = puzzle("fuse", fusible, *options, "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["runs"] == planned["runs"]
    assert [(run["first"], run["last"], run["widths"]) for run in found["runs"]] == [(1, 2, [48, 96]), (5, 7, [40, 96])]
    assert found["num_layers"] == {"before": 11, "after": 8}
    assert found["layer_origins"] == [0, 2, 3, 4, 7, 8, 9, 10]
    assert all(0 < run["dependency"] < 2 for run in found["runs"])
    assert found["parallel"]["pairs"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "dependency.json").read_text())
    assert saved["layers"]["dependency"][1][2] == pytest.approx(found["runs"][0]["dependency"], rel=1e-5)
    again = puzzle(
        "fuse", fusible, "--dependency", out / "dependency.json", "--max-dependency", 2, "--dry-run", "--json"
    )
    assert [run["first"] for run in json.loads(again.stdout)["runs"]] == [1, 5]
    measured = puzzle(
        "evaluate", parent, out, "--data", corpus, *TEXT, "--repeats", 1, "--input-len", 8, "--output-len", 4, "--json"
    )
    assert measured.exit_code == 0, (measured.output, measured.exception)
    assert json.loads(measured.stdout)["child"]["kl"] > 0
    one_line_error(puzzle("fuse", fusible, "--runs", "1-3", "--out", out), "is not empty", "--force")
    assert puzzle("fuse", fusible, "--runs", "1-3", "--out", out, "--force").exit_code == 0
    assert len(child_of_checkpoint(out).layers) == 9


@pytest.mark.parametrize(
    ("runs", "wanted"),
    [
        ("3", ["'3' is no run", "3-5,8-11"]),
        ("1-2,2-3", ["1-2 and 2-3 overlap"]),
        ("3-5", ["--runs 3-5: layer 4 has attention", "1-3, 5-8"]),
        ("8-9", ["layer 9 has a linear FFN"]),
        ("9-11", ["outside the child's layers 0-10"]),
        ("5-6", ["fewer than two of its layers have an FFN"]),
        ("2-1", ["holds no two layers"]),
        ("solved", ["records no runs", "--fusion"]),
    ],
)
def test_bad_runs(puzzle, one_line_error, fusible, tmp_path, runs, wanted):
    one_line_error(puzzle("fuse", fusible, "--runs", runs, "--out", tmp_path / "x"), *wanted)
    assert not (tmp_path / "x").exists()


def test_other_bad_input(puzzle, one_line_error, fusible, parent, corpus, tmp_path, monkeypatch):
    text, out = ("--data", corpus, *TEXT), ("--out", tmp_path / "x")
    for arguments, wanted in (
        (
            (parent, *text, *out),
            ["no two neighbouring layers without attention (none of its 4 layers)", "puzzle solve"],
        ),
        ((parent, *out), ["no two neighbouring layers without attention"]),
        ((fusible, *out), ["pass --data", "--runs"]),
        ((fusible, *text), ["--out is missing", "--dry-run"]),
        ((fusible, *text, *out, "--max-dependency", 1e-9), ["--max-dependency 1e-09 leaves nothing", "1-3, 5-8"]),
        ((fusible, *text, *out, "--max-dependency", 0), ["--max-dependency 0", "above 0"]),
        ((fusible, *text, *out, "--max-width", "20"), ["--max-width 20 leaves nothing"]),
        ((fusible, *text, *out, "--max-width", "wide"), ["--max-width wide"]),
        ((fusible, *text, *out, "--max-width", "1.1.1x"), ["--max-width 1.1.1x"]),
        ((fusible, *text, "--dependency-only"), ["--dependency-only it is a file"]),
        ((fusible, "--dependency-only", "--out", tmp_path / "d.json"), ["pass --data"]),
        ((fusible, "--runs", "1-2", "--parallel-blocks", *out), ["--parallel-blocks", "--data"]),
        ((fusible, *text, "--dependency", "x.json", *out), ["leave one out"]),
        ((fusible, "--dependency", tmp_path / "x.json", *out), ["does not exist", "puzzle fuse"]),
        ((fusible, "--runs", "1-2", "--heat-map", tmp_path / "m.png", *out), ["--heat-map", "not measured"]),
        ((fusible, "--sequences", 0, *out), ["--sequences 0"]),
        ((tmp_path / "nowhere", *out), ["does not exist"]),
        ((fusible, "--runs", "1-2", "--out", fusible), ["is not empty"]),
    ):
        one_line_error(puzzle("fuse", *arguments), *wanted)
    assert [path.name for path in tmp_path.iterdir()] == []
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    one_line_error(puzzle("fuse", fusible, *text, *out, "--heat-map", tmp_path / "m.png"), "matplotlib", "[report]")


def test_rows_of_two_need_no_keep_last(puzzle, one_line_error, parent, tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("fuse_conftest_cli", Path(__file__).with_name("conftest.py"))
    make = module_from_spec(spec)
    spec.loader.exec_module(make)
    child = make.random_child(parent, [make.BLOCK, make.free(8), make.free(16), make.BLOCK])
    source = make.write(child, tmp_path / "child")
    one_line_error(puzzle("fuse", source, "--out", tmp_path / "x"), "two FFNs each", "--no-keep-last")


def test_from_solve_to_a_fused_child(puzzle, one_line_error, costly, parent, corpus, tmp_path):
    """dependency of the parent -> solve --fusion -> export -> fuse without further options -> as promised."""
    copy = costly
    dependency = tmp_path / "dependency.json"
    done = puzzle("fuse", parent, "--data", corpus, *TEXT, "--dependency-only", "--out", dependency)
    assert done.exit_code == 0, (done.output, done.exception)
    goal = ("--throughput", "2.6x", "--fusion", "--fusion-dependency", dependency, *SOLVE)
    shown = puzzle("solve", copy, *goal)
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "to be fused: layers" in shown.stderr
    assert "an affine fit" in shown.stderr
    assert "charged for dependency (dependency.json)" in shown.stderr.replace("\n", " ")
    plain = puzzle("solve", copy, "--throughput", "2x", "--fusion", *SOLVE, "--out", tmp_path / "free")
    assert "fusion is charged no score" in plain.stderr
    solved = json.loads((copy / "solution/architecture.json").read_text())
    assert solved["fuse"], "this goal needs fusion"
    child = tmp_path / "child"
    assert puzzle("export", copy, copy / "solution", "--parent", parent, "--out", child).exit_code == 0
    done = puzzle("fuse", child, "--out", tmp_path / "fused", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert [[run["first"], run["last"]] for run in found["runs"]] == solved["fuse"]
    fused = child_of_checkpoint(tmp_path / "fused")
    assert fused.num_parameters == solved["predicted"]["num_parameters"]
    record = json.loads((tmp_path / "fused/architecture.json").read_text())
    assert record["fused"] == solved["fuse"]
    assert record["fuse"] is None
    assert "predicted" in (tmp_path / "fused/README.md").read_text()
    for arguments, wanted in (
        (("--fusion-dependency", dependency), "--fusion-dependency is not used without --fusion"),
        (("--fusion", "--pareto", "throughput"), "--fusion is not used with --pareto"),
        (("--fusion", "--baseline", "greedy"), "--fusion is not used with --baseline"),
        (("--fusion", "--fusion-dependency", tmp_path / "none.json"), "does not exist"),
    ):
        one_line_error(puzzle("solve", copy, "--throughput", "2x", *arguments, *SOLVE), wanted)


def test_help_shows_examples(puzzle):
    done = puzzle("fuse", "--help")
    assert done.exit_code == 0
    assert "puzzle fuse child --runs 3-5,8-11 --out fused" in done.output


def test_a_child_that_cannot_be_fused_is_not_measured(puzzle, one_line_error, parent, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("puzzle.fuse.verb.open_walker", None)
    done = puzzle("fuse", parent, "--data", corpus, "--out", tmp_path / "fused")
    one_line_error(done, "has no two neighbouring layers without attention")
