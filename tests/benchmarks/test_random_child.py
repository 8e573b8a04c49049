"""A child of made-up tensors is written and opened as any other."""

from __future__ import annotations

from dataclasses import replace

import torch

from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.export.hf import write_hf
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model
from random_child import random_child


def test_what_is_written_is_read_back(tmp_path):
    parent = replace(known_structure("reference"), tied=False)
    usual = parent.usual
    layers = [
        usual,
        {"attention": replace(usual["attention"], num_key_value_heads=1), "ffn": NO_OP},
        {"attention": Linear(hidden_size=256, norm_eps=1e-5), "ffn": replace(usual["ffn"], intermediate_size=48)},
    ]
    made = []

    def make(shape):
        made.append(shape)
        return torch.full(shape, float(len(made)), dtype=torch.bfloat16)

    child = random_child(parent.with_layers(layers), usual, make, torch.bfloat16, tokenizer=None)
    assert made == []
    write_hf(child, tmp_path / "child", card="")
    opened = open_model(tmp_path / "child")
    opened.check()
    assert opened.structure == parent.with_layers(layers)
    assert opened.weights(2, "ffn")["norm.weight"].tolist() == [1.0] * 256
    assert len(made) == 2 + sum(len(s) > 1 for layer in layers for b in layer.values() for s in b.tensors().values())


def test_layers_of_a_large_parent_are_copies_of_the_first(load_script, tmp_path):
    script = load_script("speed/bench_score.py")
    script.make_parent(tmp_path / "parent", "reference", 3)
    opened = open_model(str(tmp_path / "parent"))
    assert opened.structure.layers == known_structure("reference").layers[:3]
    for slot in ("attention", "ffn"):
        first, last = opened.weights(0, slot), opened.weights(2, slot)
        assert all(torch.equal(first[name], last[name]) for name in first)
        assert first.keys() == last.keys()
