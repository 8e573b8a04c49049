"""Precision as a choice of the same problem: exact against brute force, never worse than one precision, priced as its tables say."""

from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import replace

import pytest

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.choose import solve
from puzzle.choose.cells import layer_cells
from puzzle.choose.cost_model import CostModel
from puzzle.choose.goal import GoalOptions
from puzzle.choose.precision import Precisions, Way
from puzzle.choose.problem import Request
from puzzle.choose.solve import choose, open_precisions, solve_library
from puzzle.library.manifest import Library, scores_path
from puzzle.measure.architecture import read_architecture
from puzzle.profile.cost_table import CostTable
from puzzle.solver.solution import no_solution

WORK = Workload(input_len=16, output_len=9)
SOLVE = ("--gpu", "h100", "--input-len", 16, "--output-len", 9)


@pytest.fixture
def precise(own_library, gpu_table) -> Library:
    """Layer 0 may lose its attention or half of its FFN; every sub-block may be in fp8, at a cost that differs by layer."""
    path = own_library / "library.json"
    facts = json.loads(path.read_text())
    first = facts["layers"]["0"]
    kept = {"attention": {"none": first["attention"]["none"]}, "ffn": {"0.5": first["ffn"]["0.5"]}}
    facts["layers"] = {"0": kept}
    path.write_text(json.dumps(facts))
    for layer in range(4):
        charges = {"attention/parent@fp8": 3, "ffn/parent@fp8": 5, "attention/parent@fp8-cache": 4}
        scores = {name: {"kl": kl * (1 + layer) * 1e-3} for name, kl in charges.items()}
        if layer == 0:
            scores |= {"attention/none": {"kl": 0.02}, "ffn/0.5": {"kl": 0.013}}
        scores_path(own_library, layer).write_text(json.dumps({"schema": 1, "key": "", "scores": scores}))
    library = Library.open(own_library)
    for precision in ("bf16", "fp8"):
        gpu_table(library, precision, "tiny" if precision == "bf16" else "tiny-fp8")
    return library


def tables(library: Library, *names: str) -> Precisions:
    return open_precisions(library, "h100", None, names or ("bf16", "fp8"))


def brute_force(library: Library, request: Request, limits, batches) -> float | None:
    """The least sum of scores of any choice within `limits` (of a prediction), by looking at all of them."""
    both, best = tables(library).tables, None
    for cache, batch in itertools.product(both, batches):
        costs = CostModel(library, Way(tables=both, cache=cache), WORK)
        for cells in itertools.product(*layer_cells(library, Way(tables=both, cache=cache))):
            found = costs.predict([c.sub_blocks for c in cells], batch, None, [c.precisions for c in cells])
            if limits(found):
                score = sum(cell.score for cell in cells)
                best = score if best is None else min(best, score)
    return best


@pytest.mark.parametrize("share", [0.97, 0.85, 0.75, 0.66, 0.58, 0.5])
def test_as_good_as_brute_force(precise, share):
    """At one number of requests, with limits on memory and on the time of a token."""
    parent = CostModel(precise, tables(precise).tables["bf16"], WORK).predict(precise.structure.layers, 4)
    memory, tpot = int(parent.memory_bytes * share), parent.tpot_seconds * (share + 0.1)
    goal = GoalOptions(memory=str(memory), tpot=f"{tpot:.12f}", concurrency=4).goal()
    request = Request(work=WORK, goal=goal)
    tpot = float(f"{tpot:.12f}")
    wanted = brute_force(precise, request, lambda p: p.memory_bytes <= memory and p.tpot_seconds <= tpot, [4])
    if wanted is None:
        with pytest.raises(UserError, match="cannot be met"):
            solve_library(precise, tables(precise), request)
        return
    found = solve_library(precise, tables(precise), request)
    assert found.objective == pytest.approx(wanted, abs=1e-12)
    assert found.status == "optimal"
    assert found.predicted.memory_bytes <= memory
    assert found.kv_dtype in ("bf16", "fp8")


def test_as_good_as_brute_force_at_any_batch(precise):
    own = CostModel(precise, tables(precise).tables["bf16"], WORK)
    for speed in (1.3,):
        goal = GoalOptions(throughput=f"{speed}x", memory="70%").goal()
        parent = own.best_parent(None)
        request = Request(work=WORK, goal=goal)

        def limits(found, parent=parent, speed=speed):
            fast = found.tokens_per_second >= speed * parent.tokens_per_second * (1 - 1e-12)
            return fast and found.memory_bytes <= 0.7 * parent.memory_bytes

        wanted = brute_force(precise, request, limits, range(1, 5))
        assert solve_library(precise, tables(precise), request).objective == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("memory", [0.9, 0.75, 0.6, 0.5])
@pytest.mark.parametrize("tpot", [1.0, 0.8, 0.6])
@pytest.mark.parametrize("backend", ["ortools", "pulp"])
def test_never_worse_than_one_precision(precise, memory, tpot, backend):
    """At the same limits, in bytes and seconds."""
    parent = CostModel(precise, tables(precise).tables["bf16"], WORK).predict(precise.structure.layers, 4)
    limits = {"memory": str(int(parent.memory_bytes * memory)), "tpot": f"{parent.tpot_seconds * tpot:.9f}"}
    request = Request(work=WORK, goal=GoalOptions(**limits, concurrency=4).goal(), backend=backend)
    found = {}
    for names in (("bf16",), ("fp8",), ("bf16", "fp8"), ("fp8", "bf16")):
        try:
            found[names] = solve_library(precise, tables(precise, *names), request).objective
        except UserError:
            found[names] = float("inf")
    either = min(found["bf16",], found["fp8",])
    assert found["bf16", "fp8"] <= either + 1e-12
    assert found["fp8", "bf16"] == pytest.approx(found["bf16", "fp8"], abs=1e-12)


def test_prices(precise, gpu_seconds):
    """Time and bytes of weights in their own precision, of what is cached in the cache's."""
    both = tables(precise).tables
    attention, ffn = precise.structure.layers[0].values()
    steps, context = 8, range(16, 24)
    for own, cache in itertools.product(both, repeat=2):
        costs = CostModel(precise, Way(tables=both, cache=cache), WORK)
        prefill, decode = costs.part_seconds(attention, 4, own)
        assert prefill == pytest.approx(gpu_seconds(attention, own, "prefill", 4, 16))
        weights = gpu_seconds(attention, own, "decode", 4, 0)
        read = [
            gpu_seconds(attention, cache, "decode", 4, c) - gpu_seconds(attention, cache, "decode", 4, 0)
            for c in context
        ]
        assert decode == pytest.approx(steps * weights + sum(read))
        assert costs.part_seconds(ffn, 4, own)[1] == pytest.approx(steps * gpu_seconds(ffn, own, "decode", 4, 0))
        sizes = {"bf16": 2, "fp8": 1}
        cached = attention.state().num_bytes(25, cache, both["bf16"].page) * 4
        assert (
            costs.layer({"attention": attention}, 1, {"attention": own}).num_bytes(4)
            == sizes[own] * attention.num_parameters + cached
        )
        assert costs.layer({"ffn": ffn}, 1, {"ffn": own}).num_bytes(4) == sizes[own] * ffn.num_parameters


def test_one_precision_is_what_its_table_says(precise):
    """`--precision fp8` is `--shapes NAME-fp8` with what fp8 costs in score."""
    goal = GoalOptions(memory="90%", concurrency=4).goal()
    for name, table in tables(precise).tables.items():
        plain = solve_library(precise, table, Request(work=WORK, goal=goal))
        asked = solve_library(precise, tables(precise, name), Request(work=WORK, goal=goal))
        assert (asked.parent_predicted, asked.costs) == (plain.parent_predicted, plain.costs)
        assert {choice.precision for layer in asked.layers for choice in layer.values()} == {name}
        assert (asked.kv_dtype, plain.kv_dtype) == (name, None)
        assert asked.objective >= plain.objective + (0 if name == "bf16" else 0.01)


def test_scores(precise):
    """Of the variant, of its weights and of its cache, which have none where there is nothing."""
    for cache in ("bf16", "fp8"):
        cells = {c.name: c for c in layer_cells(precise, Way(tables=tables(precise).tables, cache=cache))[0]}
        kept = {"bf16": 0.0, "fp8": 0.004}[cache]
        wanted = {
            "parent:bf16|parent:bf16": kept, "parent:fp8|parent:bf16": kept + 0.003, "parent:bf16|0.5:fp8": kept + 0.018,
            "parent:fp8|0.5:fp8": kept + 0.021, "none:bf16|parent:fp8": 0.025, "none:bf16|0.5:bf16": 0.033,
        }  # fmt: skip
        assert {name: cells[name].score for name in wanted} == pytest.approx(wanted)
        assert len(cells) == 3 * 4
        assert cells["parent:fp8|0.5:bf16"].choices("x")["attention"].precision == "fp8"


def test_the_verb(puzzle, one_line_error, precise, tmp_path):
    words = ("--memory", "70%", "--concurrency", 4, *SOLVE, "--out", tmp_path / "s")
    done = puzzle("solve", precise.root, *words, "--precision", "bf16,fp8", "--pin", "1", "--explain")
    assert done.exit_code == 0, done.output
    found = read_architecture(tmp_path / "s")
    assert found.layers[1]["ffn"].variant == "parent"
    assert found.fp8_weights
    assert "sub-blocks fp8, cache" in " ".join(done.output.split())
    for words in (("--also", "16/4@1:tpot=100%"), ("--throughput", "1.2x", "--same-batch"), ("--baseline", "greedy")):
        again = ("--memory", "75%", *SOLVE, "--out", tmp_path / "t", "--precision", "bf16,fp8", *words)
        done = puzzle("solve", precise.root, *again)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--precision", "bf16,int4"), "--precision bf16,int4: "),
        (("--precision", "fp8,fp8"), "--precision fp8,fp8: 'fp8' stands there twice"),
        (("--precision", "bf16,fp8", "--engine", "vllm"), "--engine has no price with --precision: leave one of them out"),
        (("--precision", "bf16,fp8", "--fusion"), "--fusion is not used with --precision"),
        (("--precision", "bf16,fp8", "--diverse", 2), "--diverse is not used with --precision"),
        (("--precision", "bf16,fp8", "--pareto", "throughput"), "--pareto is not used with --precision"),
        (("--precision", "bf16,fp8", "--shapes", "tiny-fp8"), "--precision bf16: the cost table 'tiny-fp8' for --gpu h100 is in fp8"),
        (("--precision", "bf16,fp8", "--shapes", "reference"), "has no '"),
        (("--precision", "bf16,fp8", "--shapes", "qwen3-8b"), "--precision bf16: the cost table 'qwen3-8b'"),
    ],
)  # fmt: skip
def test_refused(puzzle, one_line_error, precise, tmp_path, words, message):
    goal = ("--throughput", "1.2x") if "--pareto" not in words else ()
    one_line_error(puzzle("solve", precise.root, *goal, *SOLVE, "--out", tmp_path / "s", *words), message)
    assert not (tmp_path / "s" / "architecture.json").exists()


def test_what_has_no_price_or_score(puzzle, one_line_error, precise, gpu_table, tmp_path):
    words = ("--memory", "70%", *SOLVE, "--out", tmp_path / "s", "--precision", "bf16,fp8")
    cpu = tuple("cpu" if word == "h100" else word for word in words)
    one_line_error(puzzle("solve", precise.root, *cpu), "--precision bf16", "--gpu cpu is in float32")
    table = precise.root / "costs/h100-test/tiny-fp8.csv"
    gpu_table(precise, "fp8", "tiny-fp8", device="another GPU")
    one_line_error(puzzle("solve", precise.root, *words), "'tiny' are of a GPU and another GPU")
    with open(table, newline="") as handle:
        rows = [CostTable(table).path, *csv.DictReader(handle)][1:]
    kept = [row for row in rows if not row["part"].startswith("swiglu")]
    with open(table, "w", newline="") as handle:
        writer = csv.DictWriter(handle, kept[0])
        writer.writeheader()
        writer.writerows(kept)
    one_line_error(
        puzzle("solve", precise.root, *words), "--precision fp8: the cost table 'tiny-fp8'", "has no 'swiglu", "--fp8"
    )
    table.write_text("part,precision\nswiglu,fp8\n")
    one_line_error(puzzle("solve", precise.root, *words), "tiny-fp8.csv line 2 is broken")
    table.unlink()
    one_line_error(
        puzzle("solve", precise.root, *words), "--precision fp8 has no cost table 'tiny-fp8'", "--gpu h100 --fp8"
    )
    gpu_table(precise, "fp8", "tiny-fp8")
    path = scores_path(precise.root, 2)
    scores = json.loads(path.read_text())["scores"]
    path.write_text(
        json.dumps({"schema": 1, "key": "", "scores": {n: s for n, s in scores.items() if n != "ffn/parent@fp8"}})
    )
    one_line_error(
        puzzle("solve", precise.root, *words), "layer 2 ffn/parent@fp8 has no score: run `puzzle score", "--fp8`"
    )
    path.unlink()
    one_line_error(puzzle("solve", precise.root, *words), "L02.json does not exist")


def test_what_nothing_meets(puzzle, one_line_error, precise, tmp_path):
    """The nearest values are those of the widest choice."""
    words = ("--memory", "1KB", "--concurrency", 4, *SOLVE, "--out", tmp_path / "s")
    done = puzzle("solve", precise.root, *words, "--precision", "bf16,fp8")
    one_line_error(done, "--memory")
    plain = puzzle("solve", precise.root, *words)
    assert done.stderr != plain.stderr


def test_an_earlier_architecture(precise, tmp_path, puzzle):
    """Without `kv_dtype` all is in the costs' precision."""
    puzzle("solve", precise.root, "--memory", "95%", *SOLVE, "--out", tmp_path / "s")
    path = tmp_path / "s" / "architecture.json"
    value = json.loads(path.read_text())
    del value["kv_dtype"]
    path.write_text(json.dumps(value))
    found = read_architecture(path)
    assert (found.kv_dtype, found.precision, found.fp8_weights) == (None, "bf16", frozenset())
    assert replace(found, kv_dtype="fp8").precision.startswith("parent bf16; child 0 of 7")


def test_a_way_that_was_not_finished(precise, monkeypatch):
    """Leaves the answer of another one unproven, down to its own bound."""

    def cut(selection, cutoff=math.inf):
        if len(selection.costs.way.tables) == 1:
            return choose(selection, cutoff)
        return None, {4: no_solution("time_limit", 0.001, 1.0, "none")}

    monkeypatch.setattr(solve, "choose", cut)
    request = Request(work=WORK, goal=GoalOptions(memory="60%", concurrency=4).goal(), time_limit=9.0)
    found = solve_library(precise, tables(precise), request)
    assert (found.status, found.bound) == ("feasible", 0.001)
    assert found.objective > 0.001
