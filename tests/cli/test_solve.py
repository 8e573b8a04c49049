"""`puzzle solve` on the tiny parent: goals met, goals out of reach, frontiers, files of one's own, bad goals."""

from __future__ import annotations

import json

import pytest

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


@pytest.mark.parametrize("backend", ["ortools", "pulp"])
def test_solve_meets_the_goal(puzzle, own_library, backend):
    done = puzzle("solve", own_library, "--throughput", "1.7x", *SOLVE, "--backend", backend, "--json")
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    assert solved["status"] == "optimal"
    assert solved["predicted"]["speedup"] >= 1.7
    assert solved["slack"]["throughput"] >= 0
    assert solved["objective"] == pytest.approx(solved["bound"])
    assert json.loads((own_library / "solution/architecture.json").read_text())["layers"] == solved["layers"]
    if backend == "pulp":
        other = json.loads(puzzle("solve", own_library, "--throughput", "1.7x", *SOLVE, "--json").stdout)
        assert other["objective"] == pytest.approx(solved["objective"], rel=1e-9)


def test_limits_hold_together(puzzle, own_library):
    done = puzzle(
        "solve", own_library, "--throughput", "1.2x", "--memory", "150000", "--params", "30000", *SOLVE, "--json"
    )
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    assert solved["predicted"]["memory_bytes"] <= 150000
    assert solved["predicted"]["num_parameters"] <= 30000
    assert set(solved["slack"]) == {"throughput", "memory", "params"}


def test_further_workloads_hold_too(puzzle, one_line_error, own_library):
    """The child meets the limits of every workload, each relative to the parent in that workload."""
    alone = json.loads(puzzle("solve", own_library, "--throughput", "1.2x", *SOLVE, "--json").stdout)
    also = ["--also", "16/8@1:ttft=70%", "--also", "16/4:throughput=1.3x"]
    done = puzzle("solve", own_library, "--throughput", "1.2x", *also, "--memory", "10MB", *SOLVE, "--json")
    assert done.exit_code == 0, done.output
    solved = json.loads(done.stdout)
    first, second = solved["also"]
    assert first["predicted"]["batch"] == 1
    assert first["predicted"]["ttft_seconds"] <= 0.7 * first["parent_predicted"]["ttft_seconds"]
    assert second["predicted"]["speedup"] >= 1.3
    assert second["predicted"]["batch"] == solved["predicted"]["batch"]
    assert solved["objective"] >= alone["objective"]
    assert {"throughput", "memory", "ttft@16/8@1", "memory@16/8@1", "throughput@16/4"} <= set(solved["slack"])
    shown = puzzle("solve", own_library, "--throughput", "1.2x", *also, *SOLVE)
    assert "also 16/8 at batch 1, predicted:" in shown.output
    far = puzzle("solve", own_library, "--also", "16/8@1:throughput=1000x", *SOLVE)
    one_line_error(far, "--also 16/8@1:throughput 1000x cannot be met: the fastest child reaches")


def test_a_goal_out_of_reach_names_what_is_reachable(puzzle, one_line_error, own_library):
    """And the named value can indeed be had."""
    done = puzzle("solve", own_library, "--throughput", "1000x", *SOLVE)
    one_line_error(done, "--throughput 1000x cannot be met", "fastest child", "x (", "relax it")
    best = float(done.stderr.split("reaches ")[1].split("x")[0])
    assert puzzle("solve", own_library, "--throughput", f"{best * 0.99}x", *SOLVE).exit_code == 0
    assert puzzle("solve", own_library, "--throughput", f"{best * 1.02}x", *SOLVE).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--throughput", "0x"], ["--throughput 0x", "above 0"]),
        (["--throughput", "-1x"], ["--throughput -1x", "above 0"]),
        (["--throughput", "fast"], ["--throughput fast", "such as 2x"]),
        (["--throughput", "nanx"], ["--throughput nanx"]),
        (["--latency", "0"], ["--latency 0", "above 0"]),
        (["--memory", "-3GB"], ["'-3GB'"]),
        (["--params", "few"], ["--params few"]),
        ([], ["no goal"]),
        (["--throughput", "2x", "--input-len", "0"], ["--input-len 0"]),
        (["--throughput", "2x", "--output-len", "9999"], ["exceed the parent's context of 256"]),
        (["--throughput", "2x", "--input-len", "100"], ["covers", "profile again"]),
        (["--memory", "1kB"], ["--memory 1000 bytes cannot be met", "smallest child"]),
        (["--params", "10"], ["--params 10 cannot be met", "smallest child"]),
        (["--latency", "1e-9"], ["--latency 1e-09 s cannot be met", "fastest child"]),
        (["--throughput", "2x", "--time-limit", "-1"], ["--time-limit -1"]),
        (["--memory", "0%"], ["--memory 0%", "above 0"]),
        (["--cached-tokens", "1M"], ["--cached-tokens needs --memory"]),
        (["--keep-attention", "99"], ["--keep-attention 99 cannot be met", "at most 4 layers"]),
        (["--throughput", "1x", "--pin", "3-9"], ["--pin 3-9", "outside the parent's layers 0-3"]),
        (["--throughput", "1x", "--stages", "9"], ["9 stages of 4 layers"]),
        (["--throughput", "1x", "--diverse", "2", "--min-distance", "9"], ["distance of 9 layers"]),
        (["--also", "32:ttft=1s"], ["--also 32:ttft=1s", "1024/64@8"]),
        (["--also", "32/8:ttft=1s,ttft=2s"], ["'ttft=2s' is no new limit"]),
        (["--also", "32/8:beauty=2x"], ["'beauty=2x'", "throughput, latency, ttft, tpot"]),
        (["--also", "32/8:ttft=-1s"], ["--ttft -1s", "above 0"]),
        (["--also", "32/8@3:ttft=1s"], ["batch 3 is not in the costs"]),
        (["--pareto", "beauty"], ["--pareto beauty", "throughput, latency, memory"]),
        (["--pareto", "memory", "--points", "1"], ["--points 1"]),
    ],
)
def test_bad_goals(puzzle, one_line_error, own_library, arguments, wanted):
    lengths = [] if any("len" in str(a) for a in arguments) else ["--input-len", 16, "--output-len", 16]
    one_line_error(puzzle("solve", own_library, "--gpu", "cpu", *lengths, *arguments), *wanted)
    assert not (own_library / "solution").exists()


def test_two_goals_in_conflict_name_both_ways_out(puzzle, one_line_error, own_library):
    """And each way out, taken alone, leads out."""
    done = puzzle("solve", own_library, "--throughput", "1000x", *SOLVE)
    most = float(done.stderr.split("reaches ")[1].split("x")[0])
    both = puzzle("solve", own_library, "--throughput", f"{most * 0.99}x", "--keep-attention", 4, *SOLVE)
    one_line_error(both, "cannot be met together", "the fastest child reaches", "at most")
    reached = float(both.stderr.split("reaches ")[1].split("x")[0])
    kept = int(both.stderr.split("at most ")[1].split()[0])
    way_out = ["--throughput", f"{reached * 0.99}x", "--keep-attention", 4, *SOLVE]
    assert puzzle("solve", own_library, *way_out).exit_code == 0
    way_out = ["--throughput", f"{most * 0.99}x", "--keep-attention", kept, *SOLVE]
    assert puzzle("solve", own_library, *way_out).exit_code == 0


def test_structure_of_the_child(puzzle, own_library, tmp_path):
    """Pins, equal layers and counts hold in the answer."""
    out = ["--out", tmp_path / "s", "--json"]
    done = puzzle("solve", own_library, "--throughput", "1.1x", "--pin", "0", "--keep-attention", "3", *SOLVE, *out)
    layers = json.loads(done.stdout)["layers"]
    assert layers[0] == {"attention": "parent", "ffn": "parent"}
    assert sum(la["attention"] != "none" for la in layers) >= 3
    done = puzzle("solve", own_library, "--throughput", "1.1x", "--alike", "0-3", *SOLVE, *out)
    layers = json.loads(done.stdout)["layers"]
    assert all(la == layers[0] for la in layers)


def test_baselines_explanations_and_relative_goals(puzzle, one_line_error, own_library, tmp_path):
    goal = ["--throughput", "1.2x", "--memory", "95%", *SOLVE, "--out", tmp_path / "s", "--json"]
    best = json.loads(puzzle("solve", own_library, *goal, "--explain").stdout)
    assert {p["limit"] for p in best["prices"]} == {"throughput", "memory"}
    assert all(p["objective"] <= best["objective"] for p in best["prices"])
    for rule in ("greedy", "uniform", "random", "no-op", "most-parameters"):
        done = puzzle("solve", own_library, *goal, "--baseline", rule)
        if done.exit_code == 0:
            assert json.loads(done.stdout)["objective"] >= best["objective"] - 1e-12
        else:
            one_line_error(done, f"--baseline {rule} finds no child")


def test_frontier_is_monotone_and_resumes(puzzle, own_library, tmp_path):
    arguments = [
        "solve",
        own_library,
        "--pareto",
        "throughput",
        "--points",
        6,
        *SOLVE,
        "--out",
        tmp_path / "f",
        "--json",
    ]
    points = json.loads(puzzle(*arguments).stdout)["points"]
    scores = [float(p["score"]) for p in points]
    assert len(points) >= 5
    assert scores == sorted(scores)
    path = tmp_path / "f" / "frontier.csv"
    kept = path.read_text()
    path.write_text("".join(kept.splitlines(keepends=True)[:3]))
    assert json.loads(puzzle(*arguments).stdout)["points"] == points
    assert sorted(path.read_text().splitlines()) == sorted(kept.splitlines())
    assert "●" in puzzle(*arguments[:-1]).output


def test_diverse_children_differ(puzzle, own_library, tmp_path):
    out = tmp_path / "d"
    goal = ["--throughput", "1.2x", "--diverse", 3, "--min-distance", 2, *SOLVE, "--out", out, "--json"]
    found = json.loads(puzzle("solve", own_library, *goal).stdout)["solutions"]
    assert [s["objective"] for s in found] == sorted(s["objective"] for s in found)
    for n, one in enumerate(found):
        for other in found[:n]:
            assert sum(a != b for a, b in zip(one["layers"], other["layers"], strict=True)) >= 2
    assert len(list(out.glob("architecture-*.json"))) == len(found)


def test_a_problem_file_of_ones_own(puzzle, one_line_error, tmp_path):
    """The documented format in, the documented format out; a conflict is in the file and on the terminal."""
    variants = [
        {"name": "a", "score": 0.0, "resources": {"memory": 2.0}},
        {"name": "b", "score": 1.0, "resources": {"memory": 1.0}},
    ]
    problem = {
        "schema": 1,
        "layers": [{"name": f"L{i:02d}", "variants": variants} for i in range(3)],
        "constraints": [{"resource": "memory", "max": 5.0}],
        "pairs": [{"a": ["L00", "b"], "b": ["L01", "a"], "score": 0.5, "resources": {"memory": -0.1}}],
        "diverse": {"count": 2, "min_distance": 2},
    }
    source, out = tmp_path / "problem.json", tmp_path / "solution.json"
    source.write_text(json.dumps(problem))
    done = puzzle("solve", "--problem", source, "--out", out)
    assert done.exit_code == 0, done.output
    value = json.loads(out.read_text())
    assert value["schema"] == 1
    assert value["conflict"] is None
    assert [s["objective"] for s in value["solutions"]] == [1.0, 1.0]
    keys = {"status", "objective", "bound", "gap", "choice", "totals", "slack", "seconds", "solver"}
    assert set(value["solutions"][0]) == keys
    source.write_text(json.dumps(problem | {"constraints": [{"resource": "memory", "max": 1.0}]}))
    one_line_error(puzzle("solve", "--problem", source, "--out", out), "memory cannot be met", "memory max 3")
    assert json.loads(out.read_text())["conflict"]["nearest"]["memory"] == {"side": "max", "value": 3.0}
    for broken, wanted in (
        ("{", "is not JSON"),
        ('{"schema": 2, "layers": []}', "schema is 2"),
        ('{"schema": 1, "layers": [], "pears": []}', "unknown field 'pears'"),
        (
            '{"schema": 1, "layers": [{"name": "L", "variants": [{"name": "v", "score": NaN}]}]}',
            "L variant v score is nan",
        ),
    ):
        source.write_text(broken)
        one_line_error(puzzle("solve", "--problem", source, "--out", out), wanted)
    one_line_error(puzzle("solve"), "name a LIBRARY")
