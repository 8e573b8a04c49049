"""The selection problem of a goal on the tiny library."""

from __future__ import annotations

import json
import random

import pytest

from puzzle.base.workload import Workload
from puzzle.choose.fusion import Fusion
from puzzle.choose.goal import GoalOptions
from puzzle.choose.problem import Request, layer_label, select
from puzzle.choose.solve import open_costs
from puzzle.choose.workloads import parse_also
from puzzle.library.manifest import Library

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_structure_of_the_child(puzzle, own_library, tmp_path):
    """Pins, equal layers and counts hold in the answer."""
    out = ["--out", tmp_path / "s", "--json"]
    done = puzzle("solve", own_library, "--throughput", "1.1x", "--pin", "0", "--keep-attention", "3", *SOLVE, *out)
    layers = json.loads(done.stdout)["layers"]
    assert {slot: choice["variant"] for slot, choice in layers[0].items()} == {"attention": "parent", "ffn": "parent"}
    assert sum(la["attention"]["variant"] != "none" for la in layers) >= 3
    done = puzzle("solve", own_library, "--throughput", "1.1x", "--alike", "0-3", *SOLVE, *out)
    layers = json.loads(done.stdout)["layers"]
    assert all(la == layers[0] for la in layers)


@pytest.mark.parametrize("batch", [1, 4])
def test_totals_of_the_problem_are_the_prediction(own_library, batch):
    """For any choice, in every workload: what the solver adds up is what is promised."""
    library = Library.open(own_library)
    goal = GoalOptions(throughput="1x", memory="1x", cached_tokens="64").goal()
    also = (parse_also("16/8@1:ttft=1x"), parse_also("16/4:tpot=1x"))
    request = Request(work=Workload(input_len=16, output_len=16), goal=goal, also=also)
    selection = select(library, open_costs(library, "cpu", None), request)
    problem, chance = selection.problem(batch), random.Random(0)
    for _ in range(50):
        choice = {layer_label(i): chance.choice(list(cells)) for i, cells in enumerate(selection.cells)}
        totals = {name: float(value) for name, value in problem.totals(choice).items()}
        layers = [cells[choice[layer_label(i)]].sub_blocks for i, cells in enumerate(selection.cells)]
        for one in selection.demands:
            promised = one.costs.predict(layers, one.at(batch))
            assert totals["seconds" + one.suffix] == pytest.approx(promised.latency_seconds, rel=1e-9)
            assert totals["prefill_seconds" + one.suffix] == pytest.approx(promised.ttft_seconds, rel=1e-9)
            assert totals["memory_bytes" + one.suffix] == promised.memory_bytes
        promised = selection.costs.predict(layers, batch)
        assert totals["num_parameters"] == promised.num_parameters
        assert totals["cached_bytes"] - totals["memory_bytes"] == (64 - 32 * batch) * promised.kv_bytes_per_token


def test_limits_of_every_workload_are_constraints(own_library):
    library = Library.open(own_library)
    goal = GoalOptions(throughput="2x", memory="50%", params="60%").goal()
    also = (parse_also("16/8@1:ttft=50%,tpot=90%"),)
    request = Request(work=Workload(input_len=16, output_len=16), goal=goal, also=also)
    selection = select(library, open_costs(library, "cpu", None), request)
    parent, other = selection.parent, selection.others[0]
    found = {c.label: (c.resource, c.max) for c in selection.constraints(4)}
    assert found == {
        "throughput": ("seconds", pytest.approx(4 * 16 / (2 * parent.tokens_per_second))),
        "memory": ("memory_bytes", pytest.approx(0.5 * parent.memory_bytes)),
        "params": ("num_parameters", pytest.approx(0.6 * parent.num_parameters)),
        "ttft@16/8@1": ("prefill_seconds@16/8@1", pytest.approx(0.5 * other.parent.ttft_seconds)),
        "tpot@16/8@1": ("decode_seconds@16/8@1", pytest.approx(0.9 * other.parent.tpot_seconds * 7)),
        "memory@16/8@1": ("memory_bytes@16/8@1", int(0.5 * selection.costs.best_parent(None).memory_bytes)),
    }


def test_twins_are_offered_with_fusion_alone(costly):
    library = Library.open(costly)
    request = {"work": Workload(input_len=16, output_len=16), "goal": GoalOptions(throughput="2x").goal()}
    table = open_costs(library, "cpu", None)
    plain = select(library, table, Request(**request))
    fusing = select(library, table, Request(**request, fusion=Fusion.open(library, None)))
    for before, after in zip(plain.cells, fusing.cells, strict=True):
        assert set(after) - set(before) == {"none|parent+", "none|0.5+", "none|0.25+"}
    assert plain.problem(4).pairs == ()
    assert len(fusing.problem(4).pairs) == 3 * 3 * 6  # twin, then any of three FFNs alone, fused on or not
