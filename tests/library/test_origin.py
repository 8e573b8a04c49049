"""Libraries of healed children: names, costs and goals are those of the model that they were made of."""

from __future__ import annotations

import shutil

from puzzle.library.manifest import Library
from puzzle.measure.architecture import read_architecture
from puzzle.runtime.model import load_model

ASKED = ("--gpu", "cpu", "--params", "60%", "--input-len", 16, "--output-len", 8)


def test_of_a_healed_child(puzzle, one_line_error, own_library, parent, child, corpus, build_options, tmp_path):
    """What is left of a layer can become less, and nothing else."""
    lib, offered = tmp_path / "lib2", ("--attention", "kv1,linear,none", "--ffn", "0.75,0.5,0.25,0.25-obs,linear,none")
    given = ("build-library", child, "--data", corpus, "--out", lib, *build_options, *offered)
    done = puzzle(*given, "--origin", parent)
    assert done.exit_code == 0, (done.output, done.exception)
    opened, whole = Library.open(lib), Library.open(own_library)
    assert opened.origin == whole.structure
    every = {"attention": ["kv1", "linear", "none"], "ffn": ["0.75", "0.5", "0.25", "0.25-obs", "linear", "none"]}
    left = [{slot: [*space][1:] for slot, space in layer.items()} for layer in opened.spaces]
    assert left == [
        every,
        every | {"attention": []},
        every | {"ffn": ["0.25", "0.25-obs", "linear", "none"]},
        {"attention": [], "ffn": []},
    ]
    for n, slot, name in ((0, "attention", "kv1"), (2, "ffn", "0.25")):
        assert opened.spaces[n][slot][name] == whole.spaces[n][slot][name]
    shutil.copytree(own_library / "costs", lib / "costs")
    solved = []
    for root in (lib, own_library):
        done = puzzle("solve", root, *ASKED)
        assert done.exit_code == 0, (done.output, done.exception)
        solved.append(read_architecture(root / "solution"))
    assert solved[0].parent_predicted == solved[1].parent_predicted
    assert solved[0].parent == whole.structure
    done = puzzle("export", lib, lib / "solution", "--out", tmp_path / "cut")
    assert done.exit_code == 0, (done.output, done.exception)
    assert list(load_model(tmp_path / "cut").structure.layers) == solved[0].sub_blocks
    told = f"library {lib} was built with names and goals of {parent.name}: use another --out, or the same --origin"
    one_line_error(puzzle(*given), told)


def test_of_no_child_of_its_origin(puzzle, one_line_error, make_child, parent, corpus, build_options, tmp_path):
    short = make_child(parent, tmp_path / "short", drop=1)
    given = ("build-library", short, "--origin", parent, "--data", corpus, "--out", tmp_path / "lib", *build_options)
    one_line_error(puzzle(*given), f"--origin {parent}: {short} has other layers, or another embedding, head or RoPE")
    assert not (tmp_path / "lib").exists()
