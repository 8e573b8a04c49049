"""Replace-one-block scores."""

from __future__ import annotations

import json

import pytest
import torch

from puzzle.data.packing import load_tokens
from puzzle.library.manifest import Library
from puzzle.library.score import load_variant
from puzzle.library.store import BlockStore
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import Block, load_model


def test_scores_are_those_of_the_whole_model(library, parent, corpus):
    """A score equals the KL of a model assembled with that one block, computed the long way."""
    opened = open_model(parent)
    data = load_tokens([str(corpus)], parent, seq_len=64, num_train=1, num_validation=6)
    whole, child = load_model(opened), load_model(opened)
    sub_block = Library.open(library).spaces[2]["attention"]["kv1"]
    of = (BlockStore(library), 2, "attention", "kv1", sub_block, torch.device("cpu"), torch.float32)
    child.blocks[2] = Block({**child.blocks[2].parts(), "attention": load_variant(*of)})
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
