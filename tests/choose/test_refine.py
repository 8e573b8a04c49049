"""Choosing by measured divergence: finalists, pairs, rounds."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import replace

import pytest

from puzzle.base.workload import Workload
from puzzle.choose.context import Around, Interactions
from puzzle.choose.goal import GoalOptions
from puzzle.choose.interactions import Terms, fit_interactions, predicted
from puzzle.choose.problem import Request, Selection, select
from puzzle.choose.refine import Refiner
from puzzle.choose.solve import architecture, choose, open_costs
from puzzle.library.children import Children
from puzzle.library.manifest import Library
from puzzle.library.passes import Passes
from puzzle.library.score import ScoreOptions
from puzzle.solver.solve import solve

SOLVE = ("--throughput", "1.2x", "--gpu", "cpu", "--input-len", 16, "--output-len", 16)
TEXT = ("--sequences", 4, "--device", "cpu")


def test_finalists(puzzle, own_library, parent, corpus, tmp_path, monkeypatch):
    """Every KL is what `evaluate` measures, the lowest is the answer, and nothing is measured twice."""
    out = tmp_path / "s"
    asked = ("solve", own_library, *SOLVE, "--finalists", 6, "--data", corpus, *TEXT, "--out", out, "--json")
    done = puzzle(*asked)
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    kls = [one["kl"] for one in found["children"]]
    assert len(kls) == 6
    assert found["best"] == kls.index(min(kls))
    sums = [one["sum_of_scores"] for one in found["children"]]
    assert sums == sorted(sums)
    plain = json.loads(puzzle("solve", own_library, *SOLVE, "--out", tmp_path / "plain", "--json").stdout)
    assert sums[0] == pytest.approx(plain["objective"], abs=1e-12)
    assert all(one["speedup"] >= 1.2 - 1e-9 for one in found["children"])
    written = json.loads((out / "architecture.json").read_text())
    assert written["measured"]["kl"] == min(kls)
    with open(out / "finalists.csv", newline="") as handle:
        assert [float(row["kl"]) for row in csv.DictReader(handle)] == kls
    told = ("--data", corpus, "--sequences", 4, "--seq-len", 64, "--no-speed", "--device", "cpu", "--json")
    measured = json.loads(puzzle("evaluate", parent, out, "--library", own_library, *told).stdout)
    assert min(kls) == pytest.approx(measured["child"]["kl"], rel=1e-4)
    monkeypatch.setattr("puzzle.library.children.Passes", None)
    assert json.loads(puzzle(*asked).stdout) == found


def test_a_run_that_is_stopped_goes_on(puzzle, own_library, corpus, tmp_path, monkeypatch):
    """After the first group of children: these are not measured again, and the answer is the same."""
    limited = ("solve", own_library, *SOLVE, "--finalists", 9, "--data", corpus, *TEXT, "--json")
    whole, seen = Passes._measured, []

    def stopped(self, paths, *more):
        for measured in whole(self, paths, *more):
            yield measured
            seen.extend(path for path, _ in measured)
            if len(seen) == 8:
                raise KeyboardInterrupt

    monkeypatch.setattr(Passes, "_measured", stopped)
    assert puzzle(*limited, "--out", tmp_path / "a").exit_code != 0
    done = puzzle(*limited, "--out", tmp_path / "a")
    assert done.exit_code == 0, (done.output, done.exception)
    assert len(seen) == len(set(seen)) == 9
    shutil.rmtree(own_library / "children")
    seen.clear()
    monkeypatch.setattr(Passes, "_measured", whole)
    assert json.loads(puzzle(*limited, "--out", tmp_path / "b").stdout) == json.loads(done.stdout)


def test_pairs_and_rounds(puzzle, own_library, corpus, tmp_path):
    out = tmp_path / "s"
    asked = ("solve", own_library, *SOLVE, "--finalists", 6, "--min-distance", 2, "--pairs", "--rounds", 2)
    done = puzzle(*asked, "--data", corpus, *TEXT, "--out", out, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    methods = [one["method"] for one in found["children"]]
    assert methods[:6] == ["mip", *["finalist"] * 5]
    assert found["pairs"]["error"] < found["pairs"]["error_before"]
    assert found["children"][found["best"]]["kl"] <= found["children"][0]["kl"]
    assert "round 1: KL" in done.stderr
    rescored = ("rescore", own_library, out, "--gpu", "cpu", "--data", corpus, *TEXT, "--out", tmp_path / "r", "--json")
    again = puzzle(*rescored)
    assert again.exit_code == 0, (again.output, again.exception)
    better = json.loads(again.stdout)
    assert better["children"][0]["method"] == "start"
    assert better["children"][better["best"]]["kl"] <= found["children"][found["best"]]["kl"]
    typed_again = puzzle(*asked, "--data", corpus, *TEXT, "--out", tmp_path / "t", "--json")  # more is measured by now
    assert [json.loads(typed_again.stdout)[name] for name in ("pairs", "children")] == [
        found["pairs"],
        found["children"],
    ]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--finalists", 4), "--data is missing: say on which text"),
        (("--finalists", 0, "--data", "."), "--finalists 0: must be above 0"),
        (("--rounds", -1, "--data", "."), "--rounds -1: must be above 0"),
        (("--finalists", 4, "--min-distance", 9, "--data", "."), "a distance of 9 layers: use 1 to 4"),
        (("--finalists", 4, "--throughput", "99x", "--memory", "1%", "--data", "."), "cannot be met"),
        (("--finalists", 4, "--data", "/nowhere"), "--data /nowhere does not exist"),
        (("--finalists", 4, "--fusion", "--data", "."), "--fusion is not used with --finalists"),
        (("--rounds", 4, "--precision", "bf16,fp8", "--data", "."), "--precision is not used with --rounds"),
        (("--pairs",), "--pairs is not used without --finalists"),
        (("--data", "."), "--data is not used without --finalists or --rounds"),
        (("--throughput", "99x", "--finalists", 4, "--data", "CORPUS"), "the fastest child reaches"),
    ],
)
def test_what_is_refused(puzzle, one_line_error, library, corpus, tmp_path, asked, told):
    """In one line, before anything is written, and before text is read, of which "." would have a lot."""
    words = [str(corpus) if word == "CORPUS" else word for word in asked]
    done = puzzle(
        "solve",
        library,
        *SOLVE,
        *words,
        *(TEXT if "--data" in words and "CORPUS" in asked else ()),
        "--out",
        tmp_path / "s",
    )
    one_line_error(done, told)
    assert not (tmp_path / "s").exists()


def test_finalists_differ_in_what_they_do(puzzle, own_library, corpus, tmp_path):
    """A window that is longer than the text is the parent there: no child is measured beside one that does the same."""
    asked = ("solve", own_library, *SOLVE, "--finalists", 8, "--data", corpus, *TEXT, "--out", tmp_path / "s", "--json")
    kls = [one["kl"] for one in json.loads(puzzle(*asked).stdout)["children"]]
    assert len(set(kls)) == len(kls) == 8


def test_too_little_for_pairs(puzzle, own_library, corpus, tmp_path):
    """Is said, and finalists and rounds are what they are without."""
    told = ("--throughput", "1.01x", "--finalists", 1, "--rounds", 1, "--data", corpus, *TEXT, "--json")
    paired = puzzle("solve", own_library, *SOLVE, *told, "--pairs", "--out", tmp_path / "a")
    assert paired.exit_code == 0, (paired.output, paired.exception)
    assert "no interactions are fitted: that takes 8 measured children" in paired.stderr
    plain = puzzle("solve", own_library, *SOLVE, *told, "--out", tmp_path / "b")
    assert json.loads(paired.stdout) == json.loads(plain.stdout)
    assert json.loads(paired.stdout)["pairs"] is None


@pytest.mark.parametrize("text", ["x", "{}", '{"schema": 1, "children": []}', '{"schema": 1, "children": {"a": {}}}'])
def test_a_broken_file_of_children_counts_as_none(puzzle, own_library, corpus, tmp_path, text):
    asked = ("solve", own_library, *SOLVE, "--finalists", 2, "--data", corpus, *TEXT, "--out", tmp_path / "s", "--json")
    found = puzzle(*asked).stdout
    (path,) = (own_library / "children").iterdir()
    whole = path.read_text()
    path.write_text(text)
    assert puzzle(*asked).stdout == found
    assert path.read_text() == whole


def test_a_child_that_is_not_finite(puzzle, one_line_error, own_library, corpus, tmp_path, monkeypatch):
    """Is named; the others that were measured with it are kept."""
    whole = Passes._measured

    def broken(self, paths, *more):
        for measured in whole(self, paths, *more):
            yield [(path, r | ({"kl": float("nan")} if n == 1 else {})) for n, (path, r) in enumerate(measured)]

    monkeypatch.setattr(Passes, "_measured", broken)
    asked = ("solve", own_library, *SOLVE, "--finalists", 4, "--data", corpus, *TEXT, "--out", tmp_path / "s")
    one_line_error(puzzle(*asked), "has no finite output: one of its blocks diverged in training; delete it and run")
    assert not (tmp_path / "s" / "architecture.json").exists()
    (path,) = (own_library / "children").iterdir()
    assert len(json.loads(path.read_text())["children"]) == 3


def test_a_dry_run_measures_nothing(puzzle, own_library, corpus, tmp_path):
    """It says how many children at most, which is no less than the run measures."""
    asked = ("solve", own_library, *SOLVE, "--finalists", 3, "--pairs", "--rounds", 2, "--data", corpus, *TEXT)
    planned = json.loads(puzzle(*asked, "--out", tmp_path / "s", "--dry-run", "--json").stdout)
    assert planned["measured_before"] == 0 < planned["plan"]["device_bytes"]
    assert not (tmp_path / "s").exists()
    assert not (own_library / "children").exists()
    assert puzzle(*asked, "--out", tmp_path / "s").exit_code == 0
    (path,) = (own_library / "children").iterdir()
    count = len(json.loads(path.read_text())["children"])
    assert 3 < count <= planned["children_at_most"]
    many = ("solve", own_library, *SOLVE, "--finalists", 10**6, "--data", corpus, *TEXT, "--dry-run", "--json")
    assert json.loads(puzzle(*many).stdout)["children_at_most"] == 10**6  # of which it looks for one
    told = ("--gpu", "cpu", "--data", corpus, *TEXT, "--dry-run", "--json")
    again = json.loads(puzzle("rescore", own_library, tmp_path / "s", *told).stdout)
    assert again["measured_before"] == count
    assert not (own_library / "rescored").exists()


def test_streamed_children_are_the_same(puzzle, own_library, corpus, tmp_path, monkeypatch):
    """Layer by layer, where memory has no room for the parent, to the bit."""
    asked = ("solve", own_library, *SOLVE, "--finalists", 5, "--rounds", 1, "--data", corpus, *TEXT, "--json")
    found = json.loads(puzzle(*asked, "--out", tmp_path / "a").stdout)
    shutil.rmtree(own_library / "children")
    plan = Children.plan
    streamed = lambda self, count: replace(plan(self, count), streamed=True, together=3, on_device=2)  # noqa: E731
    monkeypatch.setattr(Children, "plan", streamed)
    assert json.loads(puzzle(*asked, "--out", tmp_path / "b").stdout) == found


def test_rescore_asks_what_was_asked(puzzle, one_line_error, own_library, corpus, tmp_path):
    """The goal is architecture.json's; what that does not hold in full, and other costs, are refused."""
    out = tmp_path / "s"
    asked = ("rescore", own_library, out, "--gpu", "cpu", "--data", corpus, *TEXT, "--out", tmp_path / "r")
    solve = ("solve", own_library, *SOLVE, "--out", out)
    assert puzzle(*solve, "--memory", "95%", "--keep-attention", 2, "--concurrency", 2, "--json").exit_code == 0
    done = puzzle(*asked, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    for one in json.loads(done.stdout)["children"]:
        assert one["batch"] == 2
        assert one["speedup"] >= 1.2 - 1e-9
        assert sum(layer["attention"] != "none" for layer in one["layers"]) >= 2
    one_line_error(puzzle(*asked[:-1], out), f"--out {out} is where {out} lies")
    assert puzzle(*solve, "--stages", 2, "--stage-tolerance", "60%").exit_code == 0
    one_line_error(puzzle(*asked), "was solved with --stages")
    assert puzzle(*solve, "--also", "16/8@1:ttft=90%").exit_code == 0
    one_line_error(puzzle(*asked), "was solved with --also")
    assert puzzle(*solve).exit_code == 0
    solved = json.loads((out / "architecture.json").read_text())
    for change, told in (
        ({"goal": solved["goal"] | {"throughput": "1.9x"}}, "the architecture misses throughput at these costs"),
        ({"costs": solved["costs"] | {"sha256": "other"}}, "--gpu cpu: the architecture was solved with other costs"),
    ):
        (out / "architecture.json").write_text(json.dumps(solved | change))
        one_line_error(puzzle(*asked), told)


@pytest.mark.parametrize(
    ("engine", "screened", "told"),
    [
        (
            ("--gpu", "h100", "--engine", "vllm"),
            [],
            "layer 1 has attention/window-128, for which there is no promise (--engine vllm: sub-blocks of kind 'gqa' with a window have "
            "not been fitted): solve again",
        ),
        (
            ("--gpu", "cpu"),
            ["attention/window-128"],
            "layer 1 has attention/window-128, which was screened out since: ",
        ),
    ],
)
def test_rescore_says_why_a_block_is_no_choice(
    puzzle, one_line_error, own_library, corpus, tmp_path, engine, screened, told
):
    out, where = tmp_path / "s", (*engine, "--input-len", 16, "--output-len", 16)
    assert puzzle("solve", own_library, "--params", "95%", *where, "--out", out).exit_code == 0
    solved = json.loads((out / "architecture.json").read_text())
    key = Library.open(own_library).spaces[1]["attention"]["window-128"].key()
    solved["layers"][1]["attention"] |= {"variant": "window-128", "sub_block": key}
    (out / "architecture.json").write_text(json.dumps(solved))
    scores = json.loads((own_library / "scores/L01.json").read_text())
    (own_library / "scores/L01.json").write_text(json.dumps(scores | {"screened": screened}))
    asked = ("rescore", own_library, out, *engine, "--data", corpus, *TEXT, "--out", tmp_path / "r")
    one_line_error(puzzle(*asked), told)


def test_marginal_scores_are_differences_of_whole_children(own_library, corpus):
    """Of children that were measured one by one."""
    library = Library.open(own_library)
    options = ScoreOptions(sequences=4, device="cpu")
    own = [{"attention": "kv1", "ffn": "0.5"}, {"attention": "parent", "ffn": "none"}] * 2
    refiner = Refiner(selection_of(library), Children(library, [str(corpus)], options))
    found = refiner.marginal(own)
    assert all("kv1" not in found[n]["attention"] for n in (0, 2))
    shutil.rmtree(own_library / "children")
    alone = Children(library, [str(corpus)], options)
    base = alone.measure([own])[0].kl
    for n, slot, name in ((0, "ffn", "none"), (1, "attention", "none"), (1, "ffn", "parent"), (3, "attention", "kv1")):
        other = [layer | ({slot: name} if n == at else {}) for at, layer in enumerate(own)]
        assert found[n][slot][name] == pytest.approx(alone.measure([other])[0].kl - base, abs=1e-6)


def test_several_alike_are_one(own_library, corpus):
    """Trust regions of several sizes may have the same best child."""
    library = Library.open(own_library)
    selection = selection_of(library)
    refiner = Refiner(selection, Children(library, [str(corpus)], ScoreOptions(sequences=4, device="cpu")))
    batch, solutions = choose(selection)
    one = architecture(selection, batch, solutions[batch])
    refiner.keep(["a", "b"], [one, one])
    refiner.keep(["c"], [one])
    assert [found.method for found in refiner.found.candidates] == ["a"]


def test_a_trust_region(own_library):
    """No more layers change than may, and what changes has the least marginal score."""
    library = Library.open(own_library)
    selection = selection_of(library, "1x")
    own = [dict.fromkeys(space, "parent") for space in library.spaces]
    marginal = [{"ffn": {"0.5": -1.0 - n}, "attention": {"none": -0.5}} for n in range(4)]
    for radius, told in ((1, -4.5), (2, -8.0), (4, -12.0)):
        around = Around(layers=own, marginal=marginal, radius=radius)
        asked = replace(selection, request=replace(selection.request, around=around), known={})
        batch, solutions = choose(asked)
        assert solutions[batch].objective == pytest.approx(told)
        cells = [dict(cell.variants) for cell in asked.chosen(solutions[batch])]
        assert sum(a != b for a, b in zip(cells, own, strict=True)) == radius


def test_interactions_are_found_again(own_library):
    """From children whose KL has them, and the solver's optimum is that of all choices, what is far apart being held fast."""
    library = Library.open(own_library)
    selection = selection_of(library)
    terms, generator = Terms(library, selection.cells), random.Random(0)
    known = Interactions(
        within=[0.4] * 4,
        adjacent=[0.3, 0.1, 0.2],
        far=0.15,
        far_sums=[0.0] * 4,
        roots=terms.roots,
        inner=terms.inner,
    )
    drawn = [
        {n: dict(generator.choice(list(layer.values())).variants) for n, layer in enumerate(selection.cells)}
        for _ in range(60)
    ]
    children = [(one, predicted(known, terms, one)) for one in drawn]
    fit = fit_interactions(library, selection.cells, children, drawn[:5])
    assert fit.error < 0.02 < fit.error_before
    assert fit.interactions.far == pytest.approx(0.15, abs=0.05)
    assert fit.interactions.adjacent == pytest.approx([0.3, 0.1, 0.2], abs=0.06)
    assert "takes 8 measured children whose scores sum to more than 0; 3 of 4 do" in fit_interactions(
        library, selection.cells, [*children[:3], ({}, 0.0)], drawn[:1]
    )
    assert "sum to 0 nats/token" in fit_interactions(library, selection.cells, children, [{}])
    request = replace(selection.request, interactions=fit.interactions)
    problem = replace(selection, request=request, known={}).problem(4)
    few = replace(problem, layers=tuple(replace(la, variants=la.variants[::3]) for la in problem.layers), pairs=())
    names = {(la.name, v.name) for la in few.layers for v in la.variants}
    few = replace(few, pairs=tuple(p for p in problem.pairs if p.a in names and p.b in names))
    assert solve(few).objective == pytest.approx(solve(few, "brute").objective)


def selection_of(library: Library, throughput: str = "1.2x") -> Selection:
    goal = GoalOptions(throughput=throughput).goal()
    return select(
        library, open_costs(library, "cpu", None), Request(work=Workload(input_len=16, output_len=16), goal=goal)
    )


def test_a_single_sequence_says_no_error(puzzle, own_library, corpus, tmp_path, monkeypatch):
    """What has no error is kept too, beside what was measured before, and a report shows it."""
    out = tmp_path / "s"
    asked = [
        "solve",
        own_library,
        *SOLVE,
        "--data",
        corpus,
        "--sequences",
        1,
        "--device",
        "cpu",
        "--out",
        out,
        "--json",
    ]
    done = puzzle(*asked, "--finalists", 4)
    assert done.exit_code == 0, (done.output, done.exception)
    assert {one["kl_stderr"] for one in json.loads(done.stdout)["children"]} == {None}
    with open(out / "finalists.csv", newline="") as handle:
        assert {row["kl_stderr"] for row in csv.DictReader(handle)} == {""}
    assert "±" not in puzzle(*asked[:-1], "--finalists", 4).stdout
    more = puzzle(*asked, "--finalists", 6)
    assert more.exit_code == 0, (more.output, more.exception)
    (path,) = (own_library / "children").glob("*.json")
    assert len(json.loads(path.read_text())["children"]) == 6
    monkeypatch.setattr("puzzle.library.children.Passes", None)
    assert puzzle(*asked, "--finalists", 4).stdout == done.stdout
    scores = next((own_library / "scores").glob("L*.json"))
    told = json.loads(scores.read_text())
    next(iter(told["scores"].values()))["kl_stderr"] = None
    scores.write_text(json.dumps(told))
    assert puzzle("report", own_library, "--out", tmp_path / "r.html").exit_code == 0
    assert "of one sequence" in (tmp_path / "r.html").read_text()


def test_what_was_written_for_another_question_goes(puzzle, own_library, corpus, tmp_path):
    out = tmp_path / "s"
    assert puzzle("solve", own_library, *SOLVE, "--finalists", 3, "--data", corpus, *TEXT, "--out", out).exit_code == 0
    there = {path.name for path in out.iterdir()}
    assert puzzle("solve", own_library, *SOLVE, "--diverse", 2, "--out", out).exit_code == 0
    assert {path.name for path in out.iterdir()} == there | {"architecture-01.json", "architecture-02.json"}
    assert puzzle("solve", own_library, *SOLVE, "--out", out).exit_code == 0
    assert {path.name for path in out.iterdir()} == {
        "architecture.json",
        "architecture-01.json",
        "architecture-02.json",
    }
    for count in (3, 2):
        assert puzzle("solve", own_library, *SOLVE, "--diverse", count, "--out", tmp_path / "d").exit_code == 0
        assert len(list((tmp_path / "d").iterdir())) == count


def test_rescore_begins_with_the_scores_of_now(puzzle, own_library, corpus, tmp_path):
    """Those that the child was solved by are no part of its answer, nor is what they proved."""
    assert puzzle("solve", own_library, *SOLVE, "--out", tmp_path / "s").exit_code == 0
    objective = json.loads((tmp_path / "s" / "architecture.json").read_text())["objective"]
    for path in (own_library / "scores").glob("L*.json"):
        told = json.loads(path.read_text())
        for score in told["scores"].values():
            score["kl"] /= 2
        path.write_text(json.dumps(told))
    asked = ("--gpu", "cpu", "--data", corpus, *TEXT, "--rounds", 1, "--out", tmp_path / "r", "--json")
    first = json.loads(puzzle("rescore", own_library, tmp_path / "s", *asked).stdout)["children"][0]
    assert (first["method"], first["sum_of_scores"]) == ("start", objective / 2)
    best = json.loads((tmp_path / "r" / "architecture.json").read_text())
    assert (best["status"], best["bound"]) == ("feasible", None)
