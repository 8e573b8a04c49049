"""The answer: optimum, baselines, prices, and children that differ."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.blocklib.none import NO_OP
from puzzle.choose.cost_model import CostModel
from puzzle.choose.goal import BY_OPTION, GoalOptions
from puzzle.choose.problem import Request, select
from puzzle.choose.solve import BASELINES, open_costs, solve_library
from puzzle.library.manifest import Library
from puzzle.measure.architecture import read_architecture, write_architecture
from puzzle.profile.engine import Constants, EngineModel
from puzzle.solver.solve import solve

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


def test_baselines_explanations_and_relative_goals(puzzle, one_line_error, own_library, tmp_path):
    goal = ["--throughput", "1.2x", "--memory", "95%", *SOLVE, "--out", tmp_path / "s", "--json"]
    best = json.loads(puzzle("solve", own_library, *goal, "--explain").stdout)
    assert {p["limit"] for p in best["prices"]} == {"throughput", "memory"}
    assert all(p["objective"] <= best["objective"] for p in best["prices"])
    for rule in BASELINES:
        done = puzzle("solve", own_library, *goal, "--baseline", rule)
        if done.exit_code == 0:
            assert json.loads(done.stdout)["objective"] >= best["objective"] - 1e-12
        else:
            one_line_error(done, f"--baseline {rule} finds no child")


def test_depth_and_uniform_width(puzzle, one_line_error, own_library, tmp_path):
    """Whole layers go, as few as the goal needs and those of the lowest scores first; or all FFNs are as wide."""
    scores = [json.loads(path.read_text())["scores"] for path in sorted((own_library / "scores").glob("L*.json"))]
    order = sorted(range(4), key=lambda n: scores[n]["attention/none"]["kl"] + scores[n]["ffn/none"]["kl"])
    asked = ("solve", own_library, "--throughput", "1.3x", *SOLVE, "--out", tmp_path / "s", "--json", "--baseline")
    layers = json.loads(puzzle(*asked, "depth").stdout)["layers"]
    gone = [n for n, layer in enumerate(layers) if layer["ffn"]["variant"] == "none"]
    assert sorted(order[: len(gone)]) == gone
    assert {choice["variant"] for layer in layers for choice in layer.values()} == {"parent", "none"}
    pinned = json.loads(puzzle(*asked, "depth", "--pin", str(order[0])).stdout)["layers"]
    assert pinned[order[0]]["ffn"]["variant"] == "parent"
    layers = json.loads(puzzle(*asked, "uniform-width").stdout)["layers"]
    assert {layer["attention"]["variant"] for layer in layers} == {"parent"}
    assert len({layer["ffn"]["variant"] for layer in layers}) == 1
    too_fast = puzzle(*asked, "uniform-width", "--throughput", "1000x")
    one_line_error(too_fast, "take uniform, which changes attention too")


def test_diverse_children_differ(puzzle, own_library, tmp_path):
    out = tmp_path / "d"
    goal = ["--throughput", "1.2x", "--diverse", 3, "--min-distance", 2, *SOLVE, "--out", out, "--json"]
    found = json.loads(puzzle("solve", own_library, *goal).stdout)["solutions"]
    assert [s["objective"] for s in found] == sorted(s["objective"] for s in found)
    for n, one in enumerate(found):
        for other in found[:n]:
            assert sum(a != b for a, b in zip(one["layers"], other["layers"], strict=True)) >= 2
    assert len(list(out.glob("architecture-*.json"))) == len(found)


def test_every_batch_is_a_candidate(own_library):
    """The answer is as good as the best over all batch sizes, measured or between, and at none is it faster."""
    library, work = Library.open(own_library), Workload(input_len=16, output_len=16)
    costs = open_costs(library, "cpu", None)
    whole = select(library, costs, Request(work=work, goal=GoalOptions(throughput="1x").goal()))
    room = whole.costs.predict(library.structure.layers, 3).memory_bytes
    for speed in ("1.05x", "1.3x"):
        goal = GoalOptions(throughput=speed, memory=str(room)).goal()
        selection = select(library, costs, Request(work=work, goal=goal))
        assert selection.parent.batch == 3  # between 1 and 4, which were measured
        every = {b: solve(selection.problem(b)) for b in selection.costs.every_batch}
        found = solve_library(library, costs, Request(work=work, goal=goal))
        least = min(s.objective for s in every.values() if s.choice)
        assert found.objective == pytest.approx(least, abs=1e-12)
        assert found.predicted.memory_bytes <= room


@pytest.mark.parametrize(
    "goal", [{"memory": "60%"}, {"latency": "90%"}, {"ttft": "50%"}, {"tpot": "60%"}, {"params": "70%"}]
)
def test_a_goal_without_throughput_holds_at_the_parents_best_batch(own_library, goal):
    library, work = Library.open(own_library), Workload(input_len=16, output_len=16)
    costs = open_costs(library, "cpu", None)
    found = solve_library(library, costs, Request(work=work, goal=GoalOptions(**goal).goal()))
    best = CostModel(library, costs, work).best_parent(None)
    assert (found.predicted.batch, found.parent_predicted) == (best.batch, best)
    assert found.speedup == found.speedup_at_same_batch > 0.99
    (option, text), at = next(iter(goal.items())), best
    own = BY_OPTION[option].own
    assert own(found.predicted) <= own(at) * float(text[:-1]) / 100 * (1 + 1e-9)
    asked = solve_library(library, costs, Request(work=work, goal=GoalOptions(**goal, concurrency=2).goal()))
    assert (asked.predicted.batch, asked.parent_predicted.batch) == (2, 2)
    assert own(asked.predicted) <= own(asked.parent_predicted) * float(text[:-1]) / 100 * (1 + 1e-9)


def test_concurrency_beyond_what_was_measured(puzzle, one_line_error, own_library, tmp_path):
    for text, wanted in (("9", "a batch of 9 lies outside the costs"), ("0", "--concurrency 0: at least 1 request")):
        done = puzzle("solve", own_library, "--memory", "60%", *SOLVE, "--concurrency", text, "--out", tmp_path / "s")
        one_line_error(done, wanted)


def test_ties_go_to_the_faster_child(own_library):
    """A sub-block that costs nothing and saves time is taken, although nothing asks for it."""
    library, work = Library.open(own_library), Workload(input_len=16, output_len=16)
    costs = open_costs(library, "cpu", None)
    selection = select(library, costs, Request(work=work, goal=GoalOptions(params="1x").goal()))
    found = solve_library(library, costs, Request(work=work, goal=GoalOptions(params="1x").goal()))
    for index, (layer, cells) in enumerate(zip(found.layers, selection.cells, strict=True)):
        own = {slot: choice.variant for slot, choice in layer.items()}
        chosen = next(cell for cell in cells.values() if dict(cell.variants) == own and not cell.fused)
        seconds = selection.costs.layer(chosen.sub_blocks, index).resources(found.predicted.batch)["seconds"]
        for other in cells.values():
            there = selection.costs.layer(other.sub_blocks, index).resources(found.predicted.batch)["seconds"]
            assert other.score != chosen.score or there >= seconds


def test_the_fastest_child_may_have_a_batch_between(own_library):
    """What a hopeless goal says can be reached can be: at a batch that was not measured."""
    library, work = Library.open(own_library), Workload(input_len=16, output_len=16)
    costs = open_costs(library, "cpu", None)
    rest = [{"attention": NO_OP, "ffn": NO_OP}] * (library.num_layers - 1)
    least = CostModel(library, costs, work).predict([library.structure.layers[0], *rest], 3)
    wanted = {"memory": str(least.memory_bytes), "pinned": "0"}
    with pytest.raises(UserError, match="the fastest child reaches ") as caught:
        solve_library(library, costs, Request(work=work, goal=GoalOptions(throughput="1e9x", **wanted).goal()))
    times = float(re.search(r"reaches ([\d.]+)x", str(caught.value))[1])
    goal = GoalOptions(throughput=f"{times * 0.99}x", **wanted).goal()
    assert solve_library(library, costs, Request(work=work, goal=goal)).predicted.batch == 3


def test_solve_does_not_promise_past_an_engines_host(own_library):
    """What the device alone would allow is refused, with what the host allows; what is promised, it allows."""
    library, work = Library.open(own_library), Workload(input_len=16, output_len=16)
    table = EngineModel("vllm", "h100", Constants(host=1e-3, host_sequence=1e-4), largest_batch=16)

    def asked(**goal):
        return Request(work=work, goal=GoalOptions(concurrency=8, **goal).goal())

    with pytest.raises(
        UserError, match=r"`tpot` 0.001 s cannot be met: .*0.0018 s, since the engine's own Python sets the pace"
    ):
        solve_library(library, table, asked(tpot="1ms"))
    with pytest.raises(
        UserError, match=r"`throughput` 1.2x cannot be met: the fastest child reaches 1.*since the engine's own Py"
    ):
        solve_library(library, table, asked(throughput="1.2x"))
    slow = EngineModel("vllm", "h100", Constants(step=1e-3, host=1e-3, host_sequence=1e-4), largest_batch=16)
    with pytest.raises(
        UserError, match=r"1000x cannot be met: at best, the fastest child reaches 1x.*the engine's own Py"
    ):
        solve_library(library, slow, asked(throughput="1000x"))  # neither the device nor the host allows it
    with pytest.raises(UserError, match=r"1000x cannot be met: no value of one of them alone"):
        solve_library(library, slow, asked(throughput="1000x", memory="1"))  # nor would the memory do
    found = solve_library(library, table, asked(throughput="1x"))
    assert found.predicted.tpot_seconds == pytest.approx(1e-3 + 8e-4)
    assert found.speedup == pytest.approx(1, abs=0.02)
    assert found.host_pace["from_batch"] == 1
    assert read_architecture_again(found) == found


def read_architecture_again(found):
    with tempfile.TemporaryDirectory() as name:
        write_architecture(Path(name) / "architecture.json", found)
        return read_architecture(Path(name))
