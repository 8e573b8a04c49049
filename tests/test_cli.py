"""Every verb end to end on the tiny parent; bad input in one line with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from puzzle.library import Library

SOLVE = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


@pytest.fixture
def own_library(library, fake_costs, tmp_path) -> Path:
    """A copy that a test may change, with known costs."""
    copy = tmp_path / "lib"
    shutil.copytree(library, copy)
    facts = json.loads((copy / "library.json").read_text())
    facts["parent"]["source"] = os.path.relpath((library / facts["parent"]["source"]).resolve(), copy.resolve())
    (copy / "library.json").write_text(json.dumps(facts))
    fake_costs(copy)
    return copy


def one_line_error(done, *wanted: str) -> None:
    """Exit code 2, no traceback, one line on standard error that holds every wanted text."""
    assert done.exit_code == 2, (done.output, done.exception)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for text in wanted:
        assert text in errors[0], errors[0]


def test_help_is_fast_and_loads_no_torch():
    code = "import sys; from puzzle.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    best = 9.0
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.perf_counter() - begin)
    assert done.stdout.strip().endswith("False")
    assert best < 0.3


@pytest.mark.parametrize("verb", ["build-library", "score", "profile", "solve", "export", "evaluate", "run"])
def test_every_verb_shows_an_example(puzzle, verb):
    done = puzzle(verb, "--help")
    assert done.exit_code == 0
    assert f"puzzle {verb} " in done.output
    assert "--json" in done.output


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


def test_further_workloads_hold_too(puzzle, own_library):
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


def test_a_goal_out_of_reach_names_what_is_reachable(puzzle, own_library):
    """And the named value can indeed be had."""
    done = puzzle("solve", own_library, "--throughput", "1000x", *SOLVE)
    one_line_error(done, "--throughput 1000x cannot be met", "fastest child", "x (", "relax it")
    best = float(done.stderr.split("reaches ")[1].split("x")[0])
    assert puzzle("solve", own_library, "--throughput", f"{best * 0.99}x", *SOLVE).exit_code == 0
    assert puzzle("solve", own_library, "--throughput", f"{best * 1.02}x", *SOLVE).exit_code == 2


def test_export_equals_the_child_in_memory(puzzle, own_library, tmp_path):
    """from_pretrained + generate of the exported child: the same logits and the same greedy tokens, cache or none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from puzzle.assemble import assemble, open_parent

    assert puzzle("solve", own_library, "--throughput", "2x", *SOLVE).exit_code == 0
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child", "--max-shard", "40kB")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "child").glob("model-*.safetensors"))) > 1
    solved = json.loads((own_library / "solution/architecture.json").read_text())
    opened = Library.open(own_library)
    child = assemble(opened, solved["layers"], open_parent(opened, None))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "child", trust_remote_code=True, dtype=torch.float32
    ).eval()
    ids = torch.randint(2, 384, (2, 23))
    with torch.no_grad():
        assert (theirs(ids).logits - child(ids)).abs().max() <= 1e-4
        cached = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=1)
        plain = theirs.generate(
            ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=1, use_cache=False
        )
        expected = ids
        for _ in range(64):
            expected = torch.cat((expected, child(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "child", trust_remote_code=True).eos_token_id == 0
    card = (tmp_path / "child/README.md").read_text()
    assert "predicted" in card
    assert "Recipe" in card
    one_line_error(puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child"), "--force")
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child", "--force")
    assert done.exit_code == 0


def test_evaluate_measures_both(puzzle, own_library, parent, corpus, tmp_path):
    puzzle("solve", own_library, "--throughput", "1.5x", *SOLVE)
    puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child")
    done = puzzle(
        "evaluate",
        parent,
        tmp_path / "child",
        "--data",
        corpus,
        "--sequences",
        4,
        "--seq-len",
        64,
        "--input-len",
        8,
        "--output-len",
        4,
        "--repeats",
        1,
        "--json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["child"]["kl"] > 0
    assert 0 <= found["child"]["top1_agreement"] <= 1
    assert found["child"]["num_parameters"] < found["parent"]["num_parameters"]
    assert found["speedup"] > 0
    same = json.loads(
        puzzle("evaluate", parent, parent, "--data", corpus, "--sequences", 4, "--no-speed", "--json").stdout
    )
    assert same["child"]["kl"] == pytest.approx(0, abs=1e-9)
    assert same["child"]["top1_agreement"] == 1


def test_run_goes_the_whole_road_and_resumes(puzzle, parent, corpus, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
parent: {parent}
data: {corpus}
build: {{attention: "kv1,none", ffn: "0.5,none", tokens: 1e3, seq_len: 32, batch_size: 4, validation_sequences: 4}}
score: {{sequences: 4}}
profile: {{batches: [1, 2]}}
goal: {{throughput: 1.3x}}
workload: {{input_len: 8, output_len: 8}}
evaluate: {{sequences: 4, repeats: 1}}
""")
    done = puzzle("run", recipe, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["schema"] == 1
    assert set(result["predicted"]) == set(result["measured"])
    assert result["predicted"]["memory_bytes"] == result["measured"]["memory_bytes"]
    assert result["predicted"]["kv_bytes_per_token"] == result["measured"]["kv_bytes_per_token"]
    assert result["predicted"]["speedup"] >= 1.3
    assert {"kl", "sum_of_scores", "top1_agreement"} <= set(result["child"])
    blocks = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/library/blocks").rglob("*.safetensors")}
    shutil.rmtree(tmp_path / "run/child")
    again = puzzle("run", recipe, "--out", tmp_path / "run")
    assert again.exit_code == 0, again.output
    assert "nothing to train" in again.stderr
    assert blocks == {p: p.stat().st_mtime_ns for p in (tmp_path / "run/library/blocks").rglob("*.safetensors")}


# -- bad input: each gets one line that says what was wrong, the value and the fix --------------------------------


def broken_parent(parent: Path, tmp_path: Path, damage: str, poison) -> Path:
    copy = tmp_path / "parent"
    shutil.copytree(parent, copy)
    config = json.loads((copy / "config.json").read_text())
    weight = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        shutil.rmtree(copy)
    elif damage == "no config":
        (copy / "config.json").unlink()
    elif damage == "bad json":
        (copy / "config.json").write_text("{oops")
    elif damage == "unsupported":
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    elif damage == "no weights":
        (copy / "model.safetensors").unlink()
    elif damage == "weight missing":
        poison(copy, weight, lambda t: None)
    elif damage == "wrong shape":
        poison(copy, weight, lambda t: t[:-1].contiguous())
    elif damage == "nan":
        poison(copy, weight, lambda t: t.index_fill(0, torch.tensor([0]), float("nan")))
    elif damage == "truncated":
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gelu":
        (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    return copy


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ("missing", ["does not exist", "hub id"]),
        ("no config", ["has no config.json"]),
        ("bad json", ["config.json is not valid JSON"]),
        ("unsupported", ["'lama'", "did you mean 'llama'", "supported: llama, mistral, qwen2, qwen3"]),
        ("no weights", ["no model.safetensors", "save_pretrained"]),
        ("weight missing", ["lacks the weight model.layers.1.mlp.up_proj.weight"]),
        ("wrong shape", ["model.layers.1.mlp.up_proj.weight", "[95, 32]", "[96, 32]"]),
        ("nan", ["model.layers.1.mlp.up_proj.weight", "32 NaN"]),
        ("truncated", ["not a whole safetensors file"]),
        ("gelu", ["hidden_act 'gelu'", "SwiGLU"]),
    ],
)
def test_bad_parents(puzzle, poison, parent, corpus, tmp_path, damage, wanted):
    out = tmp_path / "lib"
    done = puzzle(
        "build-library",
        broken_parent(parent, tmp_path, damage, poison),
        "--data",
        corpus,
        "--out",
        out,
        "--seq-len",
        32,
    )
    one_line_error(done, *wanted)
    assert not out.exists()


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda d: [], ["no data", "--data"]),
        (lambda d: ["--data", d / "nowhere"], ["does not exist"]),
        (lambda d: ["--data", d / "empty"], ["no text files"]),
        (lambda d: ["--data", f"{d}/*.nothing"], ["matches no file"]),
        (lambda d: ["--data", d / "blank.txt"], ["every document is empty"]),
        (lambda d: ["--data", d / "short.txt"], ["less than one sequence of 128", "--seq-len"]),
        (lambda d: ["--data", d / "bad.jsonl"], ["line 2 is not JSON"]),
        (lambda d: ["--data", d / "field.jsonl"], ["no text field 'text'", "body", "--text-field"]),
    ],
)
def test_bad_data(puzzle, parent, tmp_path, make, wanted):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("x = 1")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    out = tmp_path / "lib"
    one_line_error(puzzle("build-library", parent, "--out", out, "--seq-len", 128, *make(tmp_path)), *wanted)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--attention", "kv2,kvv1"], ["unknown attention variant 'kvv1'", "did you mean 'kv1'"]),
        (["--attention", "kv3"], ["'kv3'", "divisor of 2"]),
        (["--ffn", "1.5"], ["'1.5'", "above 0 and at most 1"]),
        (["--ffn", "0"], ["'0'", "above 0"]),
        (["--layers", "2-9"], ["'2-9' is outside the parent's layers 0-3"]),
        (["--layers", "a"], ["is no layer or range"]),
        (["--tokens", "many"], ["--tokens many"]),
        (["--seq-len", "4096"], ["longer than the parent's context of 256"]),
        (["--lr", "-1"], ["--lr -1: must be above 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--device", "cuda"], ["no CUDA GPU"]),
        (["--memory-limit", "lots"], ["'lots' is no amount of memory"]),
        (["--memory-limit", "1kB"], ["one layer with its variants needs"]),
    ],
)
def test_bad_build_options(puzzle, parent, corpus, tmp_path, arguments, wanted):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    out = tmp_path / "lib"
    size = [] if "--seq-len" in arguments else ["--seq-len", 32]
    one_line_error(puzzle("build-library", parent, "--data", corpus, "--out", out, *size, *arguments), *wanted)
    assert not out.exists()


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
def test_bad_goals(puzzle, own_library, arguments, wanted):
    lengths = [] if any("len" in str(a) for a in arguments) else ["--input-len", 16, "--output-len", 16]
    one_line_error(puzzle("solve", own_library, "--gpu", "cpu", *lengths, *arguments), *wanted)
    assert not (own_library / "solution").exists()


def test_two_goals_in_conflict_name_both_ways_out(puzzle, own_library):
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


def test_baselines_explanations_and_relative_goals(puzzle, own_library, tmp_path):
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


def test_a_problem_file_of_ones_own(puzzle, tmp_path):
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


def test_unknown_gpu(puzzle, own_library):
    one_line_error(
        puzzle("solve", own_library, "--throughput", "2x", "--gpu", "cpo"), "--gpu cpo", "did you mean 'cpu'"
    )
    one_line_error(puzzle("profile", own_library, "--gpu", "b9000"), "--gpu b9000")


def test_library_of_another_parent(puzzle, poison, own_library, parent, corpus, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    poison(other, "model.norm.weight", lambda t: t + 1)
    done = puzzle("build-library", other, "--data", corpus, "--out", own_library, "--seq-len", 32)
    one_line_error(done, "built from another parent", "use another --out")
    done = puzzle("score", own_library, "--data", corpus, "--parent", other)
    one_line_error(done, "built from another parent", "--parent")


@pytest.mark.parametrize("damage", ["truncated", "tampered", "missing"])
def test_damaged_library_files(puzzle, own_library, tmp_path, damage):
    assert puzzle("solve", own_library, "--throughput", "2x", *SOLVE).exit_code == 0
    for path in own_library.glob("blocks/*/*/*.safetensors"):
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        elif damage == "tampered":
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        else:
            path.unlink()
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "child")
    one_line_error(done, ".safetensors", "missing" if damage == "missing" else "truncated or changed", "build-library")
    assert [p.name for p in tmp_path.iterdir()] == ["lib"], "nothing half-written is left"


def test_missing_artefacts_name_the_verb_that_makes_them(puzzle, own_library, tmp_path):
    one_line_error(
        puzzle("solve", tmp_path / "x", "--throughput", "2x", *SOLVE), "does not exist", "puzzle build-library"
    )
    one_line_error(puzzle("export", own_library, tmp_path, "--out", tmp_path / "c"), "does not exist", "puzzle solve")
    shutil.rmtree(own_library / "scores")
    one_line_error(puzzle("solve", own_library, "--throughput", "2x", *SOLVE), "does not exist", "puzzle score")
    shutil.rmtree(own_library / "costs")
    one_line_error(puzzle("solve", own_library, "--throughput", "2x", *SOLVE), "no cost table", "puzzle profile")


def test_output_directories(puzzle, own_library, parent, corpus, tmp_path):
    puzzle("solve", own_library, "--throughput", "2x", *SOLVE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("mine")
    done = puzzle("export", own_library, own_library / "solution", "--out", tmp_path / "full")
    one_line_error(done, "is not empty", "--force")
    assert (tmp_path / "full/precious").read_text() == "mine"
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        done = puzzle("build-library", parent, "--data", corpus, "--out", out, "--seq-len", 32)
        assert done.exit_code == 2, done.output
        assert "error: cannot write" in done.stderr


def test_disk_full_in_the_middle_keeps_what_was_complete(puzzle, parent, corpus, tmp_path, monkeypatch):
    """The tenth block cannot be written; the blocks before it stay, and the next run completes the library."""
    import errno

    from puzzle.blocklib import store

    written = []
    real = store.save_file

    def full(tensors, path, metadata=None):
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(store, "save_file", full)
    arguments = (
        "build-library",
        parent,
        "--data",
        corpus,
        "--out",
        tmp_path / "lib",
        "--tokens",
        512,
        "--seq-len",
        32,
        "--batch-size",
        4,
        "--no-score",
    )
    one_line_error(puzzle(*arguments), "disk full", "run the same command again")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "lib").rglob("blocks/**/*.json")}
    assert len(kept) == 9
    assert not list((tmp_path / "lib").rglob("*.tmp"))
    monkeypatch.setattr(store, "save_file", real)
    assert puzzle(*arguments).exit_code == 0
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("build: {}", "names no parent"),
        ("parent: p\nbuld: {}", "unknown key 'buld'; did you mean 'build'"),
        ("parent: p\nbuild: {ffns: x}", "unknown key 'build.ffns'; did you mean 'ffn'"),
        ("parent: p\nbuild: {tokens: many}", "build.tokens is 'many'"),
        ("parent: [", "not valid YAML"),
        ("parent: p\ngoal: 2x", "'goal' is '2x'"),
    ],
)
def test_bad_recipes(puzzle, tmp_path, text, wanted):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run"), wanted)
    assert not (tmp_path / "run").exists()
