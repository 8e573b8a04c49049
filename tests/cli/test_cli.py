"""What all verbs share: help, missing files and output directories; errors are one line each."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_help_is_fast_and_loads_no_torch():
    code = "import sys; from puzzle.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    best = 9.0
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - begin)
    assert done.stdout.strip().endswith("False")
    assert best < 0.3


@pytest.mark.parametrize("verb", ["build-library", "score", "profile", "solve", "export", "evaluate", "run"])
def test_every_verb_shows_an_example(puzzle, verb):
    done = puzzle(verb, "--help")
    assert done.exit_code == 0
    assert f"puzzle {verb} " in done.output
    assert "--json" in done.output


def test_unknown_gpu(puzzle, one_line_error, own_library):
    one_line_error(
        puzzle("solve", own_library, "--throughput", "2x", "--gpu", "cpo"), "--gpu cpo", "did you mean 'cpu'"
    )
    one_line_error(puzzle("profile", own_library, "--gpu", "b9000"), "--gpu b9000")


def test_missing_artefacts_name_the_verb_that_makes_them(puzzle, one_line_error, own_library, tmp_path):
    one_line_error(
        puzzle("solve", tmp_path / "x", "--throughput", "2x", *SOLVE), "does not exist", "puzzle build-library"
    )
    one_line_error(puzzle("export", own_library, tmp_path, "--out", tmp_path / "c"), "does not exist", "puzzle solve")
    shutil.rmtree(own_library / "scores")
    one_line_error(puzzle("solve", own_library, "--throughput", "2x", *SOLVE), "does not exist", "puzzle score")
    shutil.rmtree(own_library / "costs")
    one_line_error(puzzle("solve", own_library, "--throughput", "2x", *SOLVE), "no cost table", "puzzle profile")


def test_output_directories(puzzle, one_line_error, own_library, parent, corpus, tmp_path):
    puzzle("solve", own_library, "--throughput", "2x", *SOLVE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("mine")
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "full")
    one_line_error(done, "is not empty", "--force")
    assert (tmp_path / "full/precious").read_text() == "mine"
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        done = puzzle("build-library", parent, "--data", corpus, "--out", out, "--seq-len", 32)
        assert done.exit_code == 2, done.output
        assert "error: cannot write" in done.stderr
