"""`puzzle evaluate` on the tiny parent and a child."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest

from tiny_parents import write_tiny_parent

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_models_that_do_not_belong_together(puzzle, one_line_error, parent, corpus, tmp_path):
    wide, other = tmp_path / "wide", tmp_path / "other"
    vocab_size = json.loads((parent / "config.json").read_text())["vocab_size"]
    write_tiny_parent("llama", wide, hidden_size=72, vocab_size=vocab_size)
    asked = ("--data", corpus, "--sequences", 2, "--seq-len", 32)
    one_line_error(puzzle("evaluate", parent, wide, *asked, "--no-speed"), "no child of it")
    shutil.copytree(parent, other)
    value = json.loads((other / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(value))
    one_line_error(puzzle("evaluate", parent, other, *asked, "--no-speed"), "has another tokenizer than")
    one_line_error(
        puzzle("evaluate", parent, parent, *asked, "--input-len", 8000, "--output-len", 8), "exceed the context of"
    )
    one_line_error(puzzle("evaluate", parent, parent, "--data", "", "--no-speed"), "--data is empty")


def test_evaluate_measures_both(puzzle, own_library, parent, corpus, tmp_path):
    puzzle("solve", own_library, "--throughput", "1.5x", *SOLVE)
    puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child")
    done = puzzle(
        "evaluate",
        parent,
        tmp_path / "child",
        "--data",
        corpus,
        "--sequences",
        4,
        "--seq-len",
        64,
        "--input-len",
        8,
        "--output-len",
        4,
        "--repeats",
        1,
        "--json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["child"]["kl"] > 0
    each = found["child"]["kl_of_sequences"]
    assert statistics.mean(each) == pytest.approx(found["child"]["kl"])
    assert statistics.stdev(each) / len(each) ** 0.5 == pytest.approx(found["child"]["kl_stderr"])
    assert len(each) == 4
    assert "kl_of_sequences" not in found["parent"]
    assert 0 <= found["child"]["top1_agreement"] <= 1
    assert found["child"]["num_parameters"] < found["parent"]["num_parameters"]
    assert found["speedup"] > 0
    done = puzzle("evaluate", parent, parent, "--data", corpus, "--sequences", 4, "--no-speed", "--json")
    same = json.loads(done.stdout)
    assert f"sequences of 256 tokens, the context of {parent}, and not of 1024" in done.stderr
    assert same["child"]["kl"] == pytest.approx(0, abs=1e-9)
    assert same["child"]["top1_agreement"] == 1
