"""Replace-one-block scores."""

from __future__ import annotations

import json

import pytest
import torch

from puzzle.blocklib.moe import Moe
from puzzle.blocklib.plain.fp8 import cache_in_fp8, rounded, weights_in_fp8
from puzzle.blocklib.plain.part import loaded, moving
from puzzle.blocklib.sub_block import MissingFace
from puzzle.data.packing import load_tokens
from puzzle.kernels.fp8 import from_fp8, to_fp8
from puzzle.library import score
from puzzle.library.assemble import read_part, read_variant
from puzzle.library.manifest import Library
from puzzle.library.passes import Passes
from puzzle.library.store import BlockStore
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import Block, load_model


def scored_here(library, corpus, puzzle, *options):
    """On the CPU, in float32, as `load_model` is: on a machine with a GPU scores are in bf16."""
    done = puzzle("score", library, "--data", corpus, "--sequences", 6, "--device", "cpu", *options)
    assert done.exit_code == 0, done.output


def test_scores_are_those_of_the_whole_model(own_library, parent, corpus, puzzle):
    """A score equals the KL of a model assembled with that one block, computed the long way."""
    library = own_library
    scored_here(library, corpus, puzzle)
    opened = open_model(parent)
    data = load_tokens([str(corpus)], parent, seq_len=64, num_train=1, num_validation=6)
    whole, child = load_model(opened), load_model(opened)
    sub_block = Library.open(library).spaces[2]["attention"]["kv1"]
    tensors = read_variant(BlockStore(library), 2, "attention", "kv1", sub_block)
    child.blocks[2] = Block({**child.blocks[2].parts(), "attention": loaded(sub_block, tensors)})
    expected = compare(whole, child, data.validation)
    found = json.loads((library / "scores/L02.json").read_text())["scores"]["attention/kv1"]
    assert found["num_tokens"] == expected["num_tokens"]
    for key in ("kl", "kl_stderr", "lm_loss", "top1_agreement"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key
    assert compare(whole, whole, data.validation)["kl"] == pytest.approx(0, abs=1e-9)


def test_joint_scores(own_library, corpus, puzzle):
    facts = json.loads((own_library / "library.json").read_text())
    for layer in facts["layers"].values():
        for slot in ("attention", "ffn"):
            layer[slot] = {"none": layer[slot]["none"]}
    (own_library / "library.json").write_text(json.dumps(facts))
    done = puzzle("score", own_library, "--data", corpus, "--sequences", 4, "--joint")
    assert done.exit_code == 0, done.output
    scores = json.loads((own_library / "scores/L01.json").read_text())["scores"]
    assert set(scores) == {"attention/none", "ffn/none", "attention/none+ffn/none"}


def test_one_sequence_has_no_error_of_the_mean(own_library, parent, corpus, puzzle, one_line_error, tmp_path):
    """Scores are kept without one, whatever the text gives; `evaluate`, which prints it, refuses text that gives no second sequence."""
    done = puzzle("score", own_library, "--data", corpus, "--sequences", 1, "--device", "cpu")
    assert done.exit_code == 0, done.output
    scores = Library.open(own_library).scores(0)
    assert all(score["kl_stderr"] is None and score["kl"] >= 0 for score in scores.values())
    (tmp_path / "short.txt").write_text("a text of few words, " * 12)
    done = puzzle(
        "evaluate", parent, parent, "--data", tmp_path / "short.txt", "--seq-len", 64, "--no-speed", "--device", "cpu"
    )
    one_line_error(
        done, "the text gives one held-out sequence of 64 tokens", "give more --data, or a smaller --seq-len"
    )


@pytest.mark.parametrize("content", ["not json", "[]", '{"schema": 0}', '{"schema": 1}'])
def test_a_broken_file_is_scored_anew(own_library, corpus, puzzle, content):
    score = ("score", own_library, "--data", corpus, "--sequences", 2, "--device", "cpu")
    assert puzzle(*score).exit_code == 0
    path = own_library / "scores/L01.json"
    before = path.read_bytes()
    path.write_text(content)
    done = puzzle(*score)
    assert done.exit_code == 0, done.output
    assert path.read_bytes() == before


def test_scores_on_other_text_go_first(own_library, corpus, puzzle, one_line_error, tmp_path, monkeypatch):
    """Wherever a second scoring is stopped, no layer keeps what does not add up with the others; what does is kept."""
    (tmp_path / "corpus").mkdir()
    for path in sorted(corpus.iterdir())[:30]:
        (tmp_path / "corpus" / path.name).write_bytes(path.read_bytes())
    paths = sorted((own_library / "scores").iterdir())
    whole, seen = Passes._carry, []
    before = [path.read_bytes() for path in paths]

    def stopped(self, begin, start, wanted, *more):
        seen.append(next(n for n, choice in enumerate(wanted[0]) if choice))
        if seen[-1] == 2:
            raise KeyboardInterrupt
        return whole(self, begin, start, wanted, *more)

    monkeypatch.setattr(Passes, "_carry", stopped)
    puzzle("score", own_library, "--data", corpus, "--sequences", 6)
    assert [path.read_bytes() for path in paths] == before
    puzzle("score", own_library, "--data", tmp_path / "corpus", "--sequences", 4)
    assert (seen, [path.is_file() for path in paths]) == ([0, 1, 2], [True, True, False, False])
    done = puzzle("solve", own_library, "--throughput", "1.1x", "--gpu", "cpu", "--input-len", 16, "--output-len", 16)
    one_line_error(done, "L02.json does not exist", "puzzle score")


def test_what_another_run_scored_until_now_is_kept(own_library, corpus, puzzle, monkeypatch):
    """Scores are read again under the lock."""
    asked = ("score", own_library, "--data", corpus, "--sequences", 2, "--seq-len", 16, "--device", "cpu")
    plain = score.held_by_all

    def another_was_faster(*arguments):
        monkeypatch.setattr(score, "held_by_all", plain)
        assert puzzle(*asked).exit_code == 0
        return plain(*arguments)

    monkeypatch.setattr(score, "held_by_all", another_was_faster)
    done = puzzle(*asked)
    assert done.exit_code == 0, done.output
    assert "all are scored already" in done.stderr


def test_what_fp8_costs_the_parents_own(own_library, parent, corpus, puzzle):
    """Beside the scores that are there, of every layer: weights and activations rounded, and what is cached."""
    facts = json.loads((own_library / "library.json").read_text())
    del facts["layers"]["3"]
    (own_library / "library.json").write_text(json.dumps(facts))
    path = own_library / "scores" / "L01.json"
    scored_here(own_library, corpus, puzzle)
    before = json.loads(path.read_text())["scores"]
    scored_here(own_library, corpus, puzzle, "--fp8")
    names = {"attention/parent@fp8", "attention/parent@fp8-cache", "ffn/parent@fp8"}
    after = json.loads(path.read_text())["scores"]
    assert after.keys() == before.keys() | names
    assert {name: after[name] for name in before} == before
    assert names == json.loads((own_library / "scores" / "L03.json").read_text())["scores"].keys()
    opened = open_model(parent)
    data = load_tokens([str(corpus)], parent, seq_len=64, num_train=1, num_validation=6)
    whole = load_model(opened)
    for name, slot, in_fp8 in (
        ("attention/parent@fp8", "attention", weights_in_fp8),
        ("attention/parent@fp8-cache", "attention", cache_in_fp8),
        ("ffn/parent@fp8", "ffn", weights_in_fp8),
    ):
        child = load_model(opened)
        parts = child.blocks[1].parts()
        child.blocks[1] = Block(parts | {slot: in_fp8(parts[slot])})
        assert after[name]["kl"] == pytest.approx(compare(whole, child, data.validation)["kl"], rel=1e-3)
        assert 0 < after[name]["kl"] < 0.1


def test_rounding_is_that_of_the_kernels(parent):
    part = load_model(open_model(parent)).blocks[0].parts()["ffn"]
    found = weights_in_fp8(part)
    assert torch.equal(
        found.up_proj.weight, from_fp8(*(x if x.ndim == 2 else x[:, None] for x in to_fp8(part.up_proj.weight)))
    )
    x = torch.randn(2, 5, 32)
    assert torch.equal(found.up_proj(x), torch.nn.functional.linear(rounded(x), found.up_proj.weight))
    assert torch.equal(found.norm.weight, part.norm.weight)
    assert not torch.equal(part.up_proj.weight, found.up_proj.weight)


def test_a_kind_whose_matrices_are_no_linear_layers(parent):
    part = load_model(open_model(parent)).blocks[0].parts()["ffn"]
    part.mixing = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(MissingFace, match="swiglu"):
        weights_in_fp8(part)


def test_a_trained_mixture_keeps_the_dtype_of_its_correction_bias(tmp_path):
    """Rounded to bf16, as a GPU computes, it would choose other experts than the exported child."""
    sizes = {"hidden_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    moe, store = Moe(**sizes, router="sigmoid", correction_bias=True), BlockStore(tmp_path)
    stored = {name: torch.randn(shape) for name, shape in moe.tensors().items()}
    store.write(0, "ffn", "few", stored, {}, {"key": "k"})
    part = read_part(store, 0, "ffn", "few", moe, moving("cpu", torch.bfloat16))
    assert torch.equal(part.gate.e_score_correction_bias, stored["gate.e_score_correction_bias"])
    assert part.gate.weight.dtype == torch.bfloat16
