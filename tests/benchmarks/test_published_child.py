"""The published child's stack: its size, which layers take turns with weights, and the script on two processes."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

import rank_tables
from puzzle.blocklib.none import NO_OP
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import random_model
from results_page import BENCHMARKS

SCRIPT = BENCHMARKS / "speed" / "bench_published_child.py"


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("speed/bench_published_child.py")


def test_the_structure_is_the_published_one(script):
    parent, unfused, fused = map(script.ULTRA.structure, script.MODELS)
    assert [s.num_parameters / 1e9 for s in (parent, unfused, fused)] == pytest.approx(
        [405.853, 253.4, 253.4], abs=0.02
    )
    count = [sum(b is not NO_OP for _, _, b in s) for s in (parent, unfused, fused)]
    assert count == [2 * 126, 64 + 126, 64 + 81]
    widths = script.ULTRA.ffns("fused")
    assert widths[-4:] == [399_360, 425_984, 343_040, 301_056]
    assert sum(widths) == sum(script.ULTRA.ffns("unfused"))
    assert all(w % (8 * 128) == 0 for w in widths)


def test_layers_take_turns_with_weights(script):
    share = replace(script.SMALL.structure("fused"), tied=True)
    chain = [b for layer in share.layers for b in layer.values() if b is not NO_OP]
    made, places = script.distinct(chain, 0)
    assert len(made) == len({b.key() for b in chain})
    made, places = script.distinct(chain, 1e9)
    assert made == places == list(range(len(chain)))
    made, places = script.distinct(chain, 10e6)
    assert len(set(chain)) < len(made) < len(chain)
    assert [chain[made[place]] for place in places] == chain
    for key in {b.key() for b in chain}:  # none is used twice before all of its shape were
        turns = [place for place, b in zip(places, chain, strict=True) if b.key() == key]
        own = len(set(turns))
        assert all(len(set(turns[i : i + own])) == own for i in range(len(turns) - own + 1))


def test_a_stack_of_turns_computes_what_it_says(script):
    """Against a model whose layers hold the same weights, each with a cache of its own."""
    share = replace(script.SMALL.structure("fused"), tied=True)
    chain = [b for layer in share.layers for b in layer.values() if b is not NO_OP]
    torch.manual_seed(0)
    runtime, held = script.stack(share, 0, 2, 16, False, None, torch.device("cpu"))
    assert held < script.weight_bytes(share, False, torch.float32)
    made, places = script.distinct(chain, 0)
    torch.manual_seed(0)
    model = random_model(share.with_layers([{"ffn": chain[n]} for n in made]), "cpu", torch.float32)
    model.blocks = torch.nn.ModuleList([model.blocks[place] for place in places])
    whole = FastRuntime(model, 2, 18)
    whole.at(16)
    for word in range(3):
        for one in (runtime, whole):
            one.ids.fill_(word)
            one.step_in_place()
        assert runtime.ids.tolist() == whole.ids.tolist()


def test_two_processes_write_the_table(torchrun, tmp_path):
    group = torchrun(2, SCRIPT, "--tp", 2, "--shares", "4", "--batches", 1, "--small", "--csv", tmp_path / "x.csv")
    for code, _, told in group:
        assert code == 0, told
    with open(tmp_path / "x.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["model"], r["tp"], r["shares"], r["all_reduces_per_token"]) for r in rows] == [
        ("parent", "2", "4", "32"), ("unfused", "2", "4", "24"), ("fused", "2", "4", "20"),
    ]  # fmt: skip
    assert all(float(r["speedup_over_parent"]) > 0 for r in rows)
    assert "| cpu | 2 | 4 | float32 | fused |" in rank_tables.published_child(rows)
