"""`puzzle slice`: what is written, what it is refused for, and the road from a sliced parent."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from fp8_parents import store_in_fp8
from puzzle.data import packing
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model
from tiny_parents import write_tiny_parent

SIZES = ("--calibration-sequences", 4, "--score-sequences", 4, "--seq-len", 32, "--device", "cpu")


def with_tokenizer(parent, out):
    for file in parent.glob("token*"):
        shutil.copyfile(file, out / file.name)
    return out


def test_a_sliced_parent_is_a_parent(puzzle, parent, corpus, tmp_path, monkeypatch):
    """The checkpoint holds what slice.json and --json say; the text is read once, and measured as `evaluate` measures it; written again
    only with --force."""
    out, read = tmp_path / "sliced", []
    plain = packing.read_source
    monkeypatch.setattr(packing, "read_source", lambda *given, **named: read.append(given) or plain(*given, **named))
    done = puzzle("slice", parent, "--hidden", 24, "--depth", 3, "--data", corpus, "--out", out, *SIZES, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(read) == 1
    told, record = json.loads(done.stdout), json.loads((out / "slice.json").read_text())
    structure = open_model(out).structure
    assert (structure.hidden_size, structure.num_layers) == (24, 3)
    assert told["hidden_size"] == [32, 24]
    assert told["num_layers"] == [4, 3]
    assert told["num_parameters"][1] == structure.num_parameters
    assert told["point"] == record["point"]
    assert sorted(told["layers"] + told["dropped"]) == [0, 1, 2, 3]
    assert record["channels"] == sorted(set(record["channels"]))
    assert len(record["channels"]) == 24
    again = puzzle("evaluate", parent, out, "--data", corpus, "--sequences", 4, "--seq-len", 32, "--no-speed", "--json")
    assert again.exit_code == 0, again.output
    assert told["measured"]["child"]["path"] == str(out)
    assert json.loads(again.stdout)["child"]["kl"] == told["measured"]["child"]["kl"] == record["point"]["kl"]
    assert "not empty" in puzzle("slice", parent, "--depth", 3, "--data", corpus, "--out", out, *SIZES).stderr


def test_unequal_widths_are_compared_as_logits_are(parent, corpus, tmp_path, puzzle):
    """KL of a narrower model: that of its logits."""
    out = tmp_path / "sliced"
    assert puzzle("slice", parent, "--hidden", 28, "--data", corpus, "--out", out, *SIZES).exit_code == 0
    whole, narrow = load_model(parent), load_model(out)
    ids = torch.randint(2, 380, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (model(ids).double().log_softmax(-1) for model in (whole, narrow))
    found = compare(whole, narrow, ids)["kl"]
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_a_dry_run_writes_nothing(puzzle, parent, corpus, tmp_path):
    done = puzzle(
        "slice",
        parent,
        "--hidden",
        24,
        "--data",
        corpus,
        "--out",
        tmp_path / "x",
        "--seq-len",
        32,
        "--dry-run",
        "--json",
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["dry_run"]
    assert told["num_bytes"] == [4 * count for count in told["num_parameters"]]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--hidden", 33), "--hidden 33: .* has 32 hidden channels: give 1 to 32"),
        (("--hidden", 0), "--hidden 0: must be above 0"),
        (("--depth", 5), "--depth 5: .* has 4 layers: give 1 to 4"),
        (("--depth", -1), "--depth -1: must be above 0"),
        (("--hidden", 30), "no words for .* --hidden 30 .* not a multiple of the number of attention heads"),
        (("--mamba-heads", 2), "--mamba-heads 2: .* has no Mamba-2: leave it out"),
        ((), "nothing to slice: pass --hidden, --depth, --mamba-heads or --mamba-head-dim"),
        (("--depth", 3, "--seq-len", 512), "--seq-len 512: .* has a context of 256 tokens"),
        (("--depth", 3, "--score-sequences", 1), "--score-sequences 1: an error of the mean takes 2"),
    ],
)
def test_refusals(puzzle, parent, corpus, tmp_path, one_line_error, options, wanted):
    done = puzzle("slice", parent, "--data", corpus, "--out", tmp_path / "x", "--seq-len", 32, *options)
    one_line_error(done)
    assert re.search(wanted, done.stderr), done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("nemotron_h", ("--mamba-heads", 4), "give a multiple of 3 and at most 6"),
        ("nemotron_h", ("--mamba-head-dim", 8), "a head has from 1 to 7 channels here"),
        ("qwen3_moe", ("--hidden", 30), "--hidden 30: products of experts want a multiple of 8"),
        ("gemma3", ("--hidden", 24), "embedding_scale would be"),
    ],
)
def test_refusals_of_families(puzzle, parent, corpus, tmp_path, one_line_error, name, options, wanted):
    source = with_tokenizer(parent, write_tiny_parent(name, tmp_path / "parent"))
    one_line_error(
        puzzle("slice", source, "--data", corpus, "--out", tmp_path / "x", "--seq-len", 32, *options), wanted
    )
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_written_anew_is_refused(puzzle, parent, child, corpus, tmp_path, one_line_error):
    """Children, whose layers differ; weights in fp8."""
    asked = ("--depth", 3, "--data", corpus, "--out", tmp_path / "x")
    one_line_error(puzzle("slice", child, *asked), "'puzzle' checkpoint", "slice its parent")
    quantised = with_tokenizer(parent, write_tiny_parent("llama", tmp_path / "fp8"))
    store_in_fp8(quantised, "odd blocks")
    one_line_error(puzzle("slice", quantised, *asked), "is in fp8: slice the checkpoint in bf16")


def test_one_held_out_sequence_is_no_measure(puzzle, parent, corpus, tmp_path, one_line_error):
    one = tmp_path / "one.txt"
    one.write_text("a few words " * 60)
    done = puzzle(
        "slice", parent, "--depth", 3, "--data", one, "--out", tmp_path / "x", "--seq-len", 64, "--device", "cpu"
    )
    one_line_error(done, "one held-out sequence of 64 tokens", "give more --data")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nemotron_h", ("--hidden", 24, "--depth", 5, "--mamba-heads", 3, "--mamba-head-dim", 6)),
        ("qwen3_moe", ("--hidden", 24, "--depth", 3)),
        ("gpt_oss", ("--hidden", 24, "--depth", 3)),
    ],
)
def test_the_road_of_a_sliced_hybrid(puzzle, parent, corpus, tmp_path, name, options):
    """Sliced from text, built and scored as any parent; its library knows where it comes from."""
    source, out = with_tokenizer(parent, write_tiny_parent(name, tmp_path / "parent")), tmp_path / "lib"
    done = puzzle("slice", source, *options, "--data", corpus, "--out", out / "parent", *SIZES)
    assert done.exit_code == 0, (done.output, done.exception)
    build = (
        "--tokens",
        0,
        "--seq-len",
        32,
        "--calibration-sequences",
        4,
        "--validation-sequences",
        2,
        "--score-sequences",
        2,
    )
    names = ("--attention", "none", "--ffn", "0.5,none" if name == "nemotron_h" else "topk=2,none")
    done = puzzle("build-library", out / "parent", "--data", corpus, "--out", out, *build, *names, "--device", "cpu")
    assert done.exit_code == 0, (done.output, done.exception)
    facts = json.loads((out / "library.json").read_text())
    assert facts["parent"]["point"] == json.loads((out / "parent" / "slice.json").read_text())["point"]
    assert facts["parent"]["point"]["fingerprint"] == open_model(source).checkpoint.fingerprint()
