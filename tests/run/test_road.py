"""`puzzle run` with every stage: checked first, planned, killed anywhere and gone on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from puzzle.base import device
from puzzle.choose.cost_model import CostModel
from puzzle.library.manifest import Library
from puzzle.measure.architecture import read_architecture
from puzzle.measure.evaluate import evaluate
from puzzle.profile.cost_table import CostTable
from puzzle.run import check, pipeline
from puzzle.run.recipe import read_recipe
from puzzle.runtime.model import load_model

ROOT = Path(__file__).parents[2]


def test_every_stage(puzzle, write, tmp_path):
    out = tmp_path / "run"
    recipe = write(profile={"precision": "float32"})
    done = puzzle("run", recipe, "--out", out, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((out / "result.json").read_text())
    names = ["build-library", "score", "profile", "solve", "child", "heal", "export nemotron-nas", "evaluate"]
    assert list(result["seconds"]) == names
    assert result["exports"] == {"hf": "healed", "nemotron-nas": "exports/nemotron-nas"}
    assert result["healed"]["after"]["kl"] < result["healed"]["before"]["kl"]
    assert result["healed"]["after"].keys() >= {"kl", "loss"} <= result["healed"]["before"].keys()
    assert set(result["predicted"]) == set(result["measured"])
    assert result["predicted"]["memory_bytes"] == result["measured"]["memory_bytes"]
    solved = json.loads((out / "solution" / "architecture.json").read_text())
    assert solved["also"]
    assert solved["prices"]
    healed, written = (load_model(out / path) for path in result["exports"].values())
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(
        healed(ids), written(ids), rtol=1e-4, atol=1e-4
    )  # its FFNs are padded: sums of other lengths
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    again = puzzle("run", recipe, "--out", out)
    assert again.exit_code == 0, again.output
    assert again.stderr.count("done already") == 5
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    later = json.loads((out / "result.json").read_text())["seconds"]
    assert all(later[name] == result["seconds"][name] for name in names[2:-1])
    # other healing: the healed child and what was exported of it are made anew, nothing before them
    assert puzzle("run", write(heal={"lr": 1e-3}), "--out", out).exit_code == 0
    changed = {path.relative_to(out).parts[0] for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"healed", "exports"}


def test_fused_and_without_heal(puzzle, write, tmp_path):
    """Rows without attention become one layer; what the recipe leaves out is left out."""
    recipe = write(
        build={"attention": "none", "ffn": "0.5"}, goal={"throughput": None, "params": "57%"},
        fuse={"max_dependency": 1.9, "keep_last": False, "sequences": 4, "seq_len": 32}, heal=None, export=None,
    )  # fmt: skip
    done = puzzle("run", recipe, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["exports"] == {"hf": "fused"}
    assert "healed" not in found
    assert load_model(tmp_path / "run" / "fused").structure.num_layers < 4


def test_children_are_measured(puzzle, write, tmp_path):
    """On the recipe's own text, before one is exported; what was chosen is not chosen again."""
    recipe = write(heal=None, export=None, solve={"explain": False, "finalists": 3})
    done = puzzle("run", recipe, "--rounds", 1, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    chosen = json.loads((tmp_path / "run" / "solution" / "finalists.json").read_text())
    best = chosen["children"][chosen["best"]]
    assert [one["method"] for one in chosen["children"][:3]] == ["mip", "finalist", "finalist"]
    assert best["kl"] <= chosen["children"][0]["kl"]
    assert read_architecture(tmp_path / "run" / "solution").measured["kl"] == best["kl"]
    again = puzzle("run", recipe, "--rounds", 1, "--out", tmp_path / "run")
    assert again.stderr.count("done already") == 3
    planned = puzzle("run", recipe, "--rounds", 1, "--out", tmp_path / "run", "--dry-run", "--json")
    assert json.loads(planned.stdout)["stages"]["solve"]["memory_bytes"] > 0


STEPPED = {
    "goal": {"throughput": None, "params": "62%"}, "solve": {"also": [], "explain": False}, "export": None,
    "steps": [{"goal": {"params": "80%"}, "build": {"tokens": 512}, "heal": {"tokens": 512}}],
}  # fmt: skip


def test_steps(puzzle, one_line_error, write, parent, corpus, tmp_path):
    """Each is solved for a goal of the first parent's, healed by it, and the parent of the next; costs are measured once."""
    out, recipe = tmp_path / "run", write(**STEPPED)
    done = puzzle("run", recipe, "--out", out, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    first = ["build-library", "score", "profile", "solve", "child", "heal"]
    then = ["build-library", "score", "solve", "child", "heal", "evaluate"]
    assert list(result["seconds"]) == [f"step 1 {name}" for name in first] + then
    (on_the_way,) = result["steps"]
    assert (on_the_way["goal"]["params"], on_the_way["healed"]["num_tokens"]) == ("0.8x", 512)
    whole, cut = (Library.open(out / name) for name in ("step-1/library", "library"))
    one, last = (read_architecture(out / name) for name in ("step-1/solution", "solution"))
    assert cut.origin == last.parent == one.parent == whole.structure
    assert list(cut.structure.layers) == one.sub_blocks
    share = [a.predicted.num_parameters / a.parent_predicted.num_parameters for a in (one, last)]
    assert [share[0] <= 0.8, share[1] <= 0.62] == [True, True]
    # names, and with them costs, are the first parent's; its promise is what a child of the first library would have been promised
    assert all(
        cut.spaces[n][s][v] == whole.spaces[n][s][v]
        for n in range(4)
        for s in cut.spaces[n]
        for v in cut.spaces[n][s]
        if v != "parent"
    )
    (table,) = (out / "step-1/library/costs/cpu").glob("*.csv")
    assert table.read_bytes() == (out / "library/costs/cpu" / table.name).read_bytes()
    promised = CostModel(whole, CostTable(table), last.workload)
    assert promised.predict(last.sub_blocks, last.predicted.batch).tokens_per_second == last.predicted.tokens_per_second
    assert promised.best_parent(None) == last.parent_predicted
    healed = json.loads((out / "healed" / "heal.json").read_text())
    assert healed["teacher"] == parent.name
    again = evaluate(str(parent), str(out / "healed"), [str(corpus)], read_recipe(recipe).evaluate)
    assert result["child"]["kl"] == again.child.kl
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert puzzle("run", recipe, "--out", out).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before
    # another child on the way: all that comes of it is made anew
    STEP = [STEPPED["steps"][0] | {"heal": {"tokens": 512, "lr": 1e-3}}]
    assert puzzle("run", write(**STEPPED | {"steps": STEP}), "--out", out).exit_code == 0
    same = {
        path.relative_to(out).parts[:2]
        for path, at in before.items()
        if path.is_file() and path.stat().st_mtime_ns == at
    }
    assert same == {("step-1", "library"), ("step-1", "child")}
    told = f"{out / 'library'} was built by a recipe with steps before it: give this recipe another --out"
    one_line_error(puzzle("run", write(**STEPPED | {"steps": []}), "--out", out), told)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Where one run is that was left alone, once for all that compare with it."""
    return tmp_path_factory.mktemp("alone") / "run"


@pytest.mark.parametrize("stage", ["step-1/heal", "build-library", "heal"])
def test_steps_killed_and_run_again(puzzle, launch, wait, write, tmp_path, alone, stage):
    """The same bits as of a run that was left alone."""
    out, recipe, (step, _, name) = tmp_path / "run", write(**STEPPED), stage.rpartition("/")
    steady = "from puzzle.profile.cpu import CpuTimer\nCpuTimer.reference = lambda timer: 1.0"
    (process,), marks = launch(("run", recipe, "--out", out), setup=steady), out / step / "stages.json"
    wait(lambda: marks.is_file() and name in json.loads(marks.read_text())["stages"], process)
    process.kill()
    process.join()
    for where in (out, alone):
        done = puzzle("run", recipe, "--out", where, "--json")
        assert done.exit_code == 0, (done.output, done.exception)
    sums = [load_model(where / "healed")(torch.arange(2, 40)[None]) for where in (out, alone)]
    assert torch.equal(*sums)


def test_the_plan_of_steps(puzzle, write, tmp_path):
    done = puzzle("run", write(**STEPPED), "--out", tmp_path / "run", "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    stages = json.loads(done.stdout)["stages"]
    first = ["build-library", "score", "profile", "solve", "child", "heal"]
    assert list(stages) == [*(f"step 1 {n}" for n in first), *(n for n in first if n != "profile"), "evaluate"]
    assert stages["step 1 heal"]["seconds"] > 0
    assert not (tmp_path / "run").exists()


def test_an_export_in_fp8(puzzle, write, tmp_path):
    """The cache's scales come from the recipe's own data; disk is counted as fp8 takes it."""
    exports = [{"format": "hf", "dtype": "fp8", "kv_dtype": "fp8"}]
    done = puzzle("run", write(heal=None, export=exports), "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["exports"] == {"hf-fp8-kv-fp8": "exports/hf-fp8-kv-fp8"}
    child, written = tmp_path / "run" / "child", tmp_path / "run" / "exports" / "hf-fp8-kv-fp8"
    assert json.loads((written / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    ids = torch.arange(2, 34)[None]
    exact, rounded = load_model(child)(ids), load_model(written)(ids)
    assert 0 < (exact - rounded).abs().mean() < 0.2 * exact.std()


@pytest.mark.parametrize("stage", ["profile", "child", "heal", "export nemotron-nas"])
def test_killed_in_any_stage_and_run_again(puzzle, launch, wait, write, tmp_path, stage):
    """The same child as of a run that was left alone, and nothing half-written."""
    out, recipe = tmp_path / "run", write(profile={"seconds": 0.001})
    steady = "from puzzle.profile.cpu import CpuTimer\nCpuTimer.reference = lambda timer: 1.0"
    (process,), marks = launch(("run", recipe, "--out", out), setup=steady), out / "stages.json"
    wait(lambda: marks.is_file() and stage in json.loads(marks.read_text())["stages"], process)
    process.kill()
    process.join()
    done = puzzle("run", recipe, "--out", out, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    assert result["healed"]["num_tokens"] == 1024
    assert {path.name for path in out.iterdir()} == {
        "library", "solution", "child", "healed", "exports", "recipe.json", "stages.json", "result.json",
    }  # fmt: skip
    ids = torch.arange(2, 40)[None]
    healed, written = (load_model(out / path) for path in result["exports"].values())
    torch.testing.assert_close(
        healed(ids), written(ids), rtol=1e-4, atol=1e-4
    )  # its FFNs are padded: sums of other lengths


def test_the_example_of_steps(puzzle, parent, corpus, tmp_path):
    """As it stands but for the parent, planned: it is the quickstart with a step and without prompts."""
    recipe, usual = (
        yaml.safe_load((ROOT / "examples" / name).read_text()) for name in ("steps.yaml", "quickstart.yaml")
    )
    changed = {name for name in recipe | usual if recipe.get(name) != usual.get(name)}
    assert changed == {"steps", "heal", "evaluate"}
    for value in (recipe["build"], recipe["heal"], recipe["evaluate"]):
        value["seq_len"] = 64
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"parent": str(parent), "workload": {"input_len": 8, "output_len": 8}}))
    done = puzzle("run", path, "--data", corpus, "--out", tmp_path / "run", "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "step 1 heal" in json.loads(done.stdout)["stages"]


def test_the_quickstart(puzzle, parent, corpus, tmp_path):
    """Every stage and option of the shipped recipe, with small numbers; the terminal ends with promise and continuations."""
    recipe = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    few = {"tokens": 512, "seq_len": 32, "batch_size": 2, "validation_sequences": 2}
    smaller = {
        "build": few | {"calibration_sequences": 2}, "score": {"sequences": 2}, "heal": few, "goal": {"throughput": "1.1x"},
        "profile": {"batches": [1, 2], "seconds": 0.005}, "workload": {"input_len": 8, "output_len": 8},
        "evaluate": {"sequences": 2, "seq_len": 32},
    }  # fmt: skip
    assert set(recipe) == {"parent", *smaller}
    for name, values in smaller.items():
        recipe[name] |= values
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"parent": str(parent)}))
    done = puzzle("run", path, "--data", corpus, "--out", tmp_path / "run")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["healed"]["num_tokens"] == 512
    texts = result["continuations"]["texts"]
    assert [text["prompt"] for text in texts] == recipe["evaluate"]["prompts"]
    assert len(texts) == 3
    ends = done.stderr[done.stderr.index("promised and delivered") :]
    assert "sampled at temperature 0.7, seed 0" in ends
    assert "def main(" in ends


BAD = [
    ({"evaluate": {"prompts": ["import os", " "]}}, "evaluate.prompts has an empty one (' ')"),
    ({"evaluate": {"prompts": ["ab " * 200]}}, "evaluate.prompts has one of 401 tokens: with 48 more they exceed"),
    ({"profile": {"gpu": "h100"}}, "profile.gpu h100: no CUDA device can be used here"),
    ({"profile": {"precision": "fp8"}}, "precision fp8 cannot be profiled on cpu"),
    ({"profile": {"contexts": [64, 128]}}, "profile.contexts 64,128 do not span this workload's 8 to 14"),
    ({"goal": {"cached_tokens": "1M"}}, "goal.cached_tokens needs goal.memory"),
    ({"goal": {"pinned": "3-9"}}, "goal.pinned 3-9: '3-9' is outside the parent's layers 0-3"),
    ({"goal": {"keep_attention": 5}}, "goal.keep_attention 5: the parent has 4 layers with attention"),
    ({"goal": {"stages": 5}}, "goal.stages 5: the parent has 4 layers"),
    ({"goal": {"concurrency": 64}}, "goal.concurrency: a batch of 64 lies outside profile.batches, which cover 1 to 2"),
    ({"workload": {"input_len": 9999}}, "workload.input_len 9999 + workload.output_len 8 exceed"),
    ({"solve": {"also": ["16/8@9:latency=1s"]}}, "a batch of 9 lies outside profile.batches"),
    ({"solve": {"also": ["16:latency=1s"]}}, "solve.also 16:latency=1s: write"),
    ({"solve": {"also": ["16/1@2:tpot=50%"]}}, "solve.also 16/1@2:tpot=50%: `tpot` is the time per later token"),
    ({"solve": {"backend": "xyz"}}, "solve.backend xyz: known: ortools, pulp"),
    ({"solve": {"fusion_dependency": "/x.json"}}, "solve.fusion_dependency is not used without solve.fusion"),
    ({"solve": {"finalists": 2}}, "solve.explain is not measured with solve.finalists: leave one of them out"),
    ({"solve": {"explain": False, "finalists": 2, "min_distance": 9}}, "solve.min_distance 9: the parent has 4 layers"),
    ({"solve": {"min_distance": 2}}, "solve.min_distance 2 is not used without solve.finalists: leave it out"),
    ({"solve": {"pairs": True}}, "solve.pairs are fitted from measured children: pass solve.finalists too"),
    ({"solve": {"baseline": "greedy"}}, "unknown key 'solve.baseline'"),
    ({"fuse": {"sequences": 0}}, "fuse.sequences 0: must be above 0"),
    ({"fuse": {"runs": "0-9"}}, "fuse.runs 0-9: '0-9' is outside the child's layers 0-3"),
    ({"fuse": {"runs": "solved"}}, "fuse.runs solved: nothing is solved for fusion"),
    ({"fuse": {"max_width": "abc"}}, "fuse.max_width abc"),
    ({"solve": {"shapes": "nope"}}, "solve.shapes nope: the costs that are measured here are called"),
    ({"goal": {"tpot": "50%"}, "workload": {"output_len": 1}}, "goal.tpot is the time per later token, and workload.output_len 1 has none"),
    ({"evaluate": {"sequences": 1}}, "evaluate.sequences 1: an error of the mean and a next token take 2"),
    ({"fuse": {"norm": "both"}}, "fuse.norm is 'both', it must be own or last"),
    ({"heal": {"kl_weight": 0, "cosine_weight": 0}}, "nothing to learn from"),
    ({"heal": {"accumulate": 3}}, "heal.accumulate 3"),
    ({"heal": {"seq_len": 4096}}, "use a smaller heal.seq_len"),
    ({"heal": {"blend": "/nowhere.yaml"}}, "heal.blend /nowhere.yaml does not exist"),
    ({"export": "onnx"}, "unknown format 'onnx'"),
    ({"export": ["hf", "hf"]}, "export has 'hf' twice"),
    ({"export": [{"format": "gguf", "dtype": "int4"}]}, "dtype int4 with"),
    ({"build": {"attention": "kv1,window-16"}, "export": "sglang"}, "export sglang cannot take 'window-16', which build.attention"),
    ({"steps": [{"heal": {"tokens": 512}}]}, "steps.1 names no goal: write a list of steps"),
    ({"steps": [{"goal": {"throughput": "1.3x"}}]}, "steps.1.goal.throughput 1.3x asks for more than what comes after it, 1.2x"),
    ({"steps": [{"goal": {"throughput": "1.1x"}}], "heal": None}, "steps: the last child has no heal: add that section"),
    ({"steps": [{"goal": {"throughput": "1.1x"}, "build": {"ffn": "0.5"}}]}, "steps.1.build.ffn: all steps choose from what build.ffn offers"),
    ({"steps": [{"goal": {"throughput": "1.1x"}, "solve": {}}]}, "unknown key 'steps.1.solve'; known: build, goal, heal"),
    ({"steps": [{"goal": {"throughput": "abc"}}]}, "goal.throughput abc"),
    ({"steps": [{"goal": {"throughput": "1.1x"}, "heal": {"accumulate": 3}}]}, "step 1: "),
    ({"steps": [{"goal": {"throughput": "1.1x"}}], "solve": {"fusion": True, "explain": False}}, "solve.fusion does not go with steps"),
    ({"data": "/nowhere"}, "/nowhere does not exist"),
    ({"evaluate": {"seq_len": 256}, "data": "short.txt"}, "less than one sequence of 256"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "told"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_is_wrong_is_said_before_anything_is_built(puzzle, one_line_error, write, tmp_path, changed, told):
    (tmp_path / "short.txt").write_text("a few words only\n" * 4)
    recipe = write(**changed)
    for extra in ((), ("--dry-run",)):
        one_line_error(puzzle("run", recipe, "--out", tmp_path / "run", *extra), told)
    assert not (tmp_path / "run").exists()


def test_a_directory_with_something_else_in_it(puzzle, one_line_error, write, tmp_path):
    """Stages replace what they find, so they find nothing that no run has made."""
    out = tmp_path / "run"
    (out / "child").mkdir(parents=True)
    (out / "child" / "thesis.txt").write_text("years of work")
    one_line_error(puzzle("run", write(), "--out", out), "is not empty and holds no run")
    assert (out / "child" / "thesis.txt").read_text() == "years of work"


def test_a_key_that_stands_twice(puzzle, one_line_error, write, tmp_path):
    recipe = write()
    recipe.write_text(recipe.read_text() + "goal: {throughput: 3x}\n")
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run"), "the key goal stands twice")


def test_a_default_export_with_more_to_say(puzzle, write, tmp_path):
    recipe = write(export=[{"format": "hf", "licence": "my-licence", "max_shard": "50KB"}], heal=None)
    done = puzzle("run", recipe, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    found = tmp_path / "run" / json.loads((tmp_path / "run/result.json").read_text())["exports"]["hf"]
    assert "license: my-licence" in (found / "README.md").read_text()
    assert len(list(found.glob("*.safetensors"))) > 1


def test_an_engine_that_lacks_the_family(puzzle, one_line_error, write, tmp_path):
    from tiny_parents import write_tiny_parent

    write_tiny_parent("gemma3", tmp_path / "gemma")
    recipe = write(parent=str(tmp_path / "gemma"), export="vllm")
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run"), "export vllm cannot take the parent itself")


def test_a_disk_that_is_too_small(puzzle, one_line_error, write, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    done = puzzle("run", write(), "--out", tmp_path / "run")
    one_line_error(done, "of disk (build-library ", "heal ", "export nemotron-nas ", "97.7 KiB are free")
    assert not (tmp_path / "run").exists()


def test_the_plan_of_every_stage(puzzle, write, tmp_path):
    recipe = write(fuse={})
    done = puzzle("run", recipe, "--out", tmp_path / "run", "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    stages = json.loads(done.stdout)["stages"]
    assert list(stages) == [
        "build-library", "score", "profile", "solve", "child", "fuse", "heal", "export nemotron-nas", "evaluate",
    ]  # fmt: skip
    for name in ("build-library", "heal"):
        assert min(stages[name].values()) > 0
    for name in ("score", "profile", "fuse", "evaluate"):
        assert stages[name]["seconds"] > 0 or stages[name]["seconds"] == 0.0
        assert stages[name]["memory_bytes"] > 0
    shown = puzzle("run", recipe, "--out", tmp_path / "run", "--dry-run")
    assert "export nemotron-nas" in shown.stderr
    assert not (tmp_path / "run").exists()


def test_the_example_for_a_gpu(puzzle, one_line_error, parent, corpus, tmp_path):
    """Read as it stands; without its GPU refused before anything; its dry parts with the tiny parent on a CPU."""
    example = ROOT / "examples" / "smollm2_h100.yaml"
    found = read_recipe(example)
    assert (found.build.tokens, found.heal.tokens, found.profile.precision) == (8_000_000, 10_000_000, "bf16")
    assert [one.name for one in found.export] == ["hf"]
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(parent)
    given = ("--data", corpus, "--out", tmp_path / "run")
    copy = Path(shutil.copy(example, tmp_path))
    one_line_error(puzzle("run", copy, *given), "profile.gpu h100: no CUDA device can be used here")
    raw = yaml.safe_load(example.read_text())
    raw["profile"], raw["workload"] = {"gpu": "cpu"}, {"input_len": 16, "output_len": 8}
    raw["build"] |= {"seq_len": 64}
    raw["heal"] |= {"seq_len": 64}
    copy.write_text(yaml.safe_dump(raw))
    done = puzzle("run", copy, *given, "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert not (tmp_path / "run").exists()


def test_the_gpu_is_asked_for_where_it_is_measured(write, monkeypatch, tmp_path):
    """A serving engine's costs come from its fitted model: then no GPU is needed here."""
    from puzzle.run.pipeline import Run

    asked = []
    monkeypatch.setattr(check, "check_gpu", asked.append)
    given = {"profile": {"gpu": "h100"}, "workload": {"input_len": 16}, "export": "hf"}
    Run(read_recipe(write(**given)), tmp_path / "run").check()
    assert asked == ["h100"]
    Run(read_recipe(write(**given, solve={"engine": "vllm"})), tmp_path / "run").check()
    assert asked == ["h100"]
    assert device.check_gpu is not check.check_gpu


@pytest.mark.parametrize("healed", ["heal", "after short"])
def test_precision_is_chosen(puzzle, write, gpu_table, one_line_error, monkeypatch, tmp_path, healed):
    """Both tables, what fp8 costs, and a healed child that is rounded after healing; as on a GPU, which is not there."""
    monkeypatch.setattr(check, "check_gpu", lambda gpu: None)

    def profile(subject, *, gpu, out, grid, precision):
        name = subject.name + ("-fp8" if precision == "fp8" else "")
        gpu_table(Library.open(tmp_path / "run" / "library"), precision, name, folder=gpu)

    def evaluated(*given, **named):
        parent, child, data, options = given
        return evaluate(parent, child, data, replace(options, device="cpu"), **named)

    monkeypatch.setattr(pipeline, "profile", profile)
    monkeypatch.setattr(pipeline, "evaluate", evaluated)
    recipe = write(
        profile={"gpu": "h100"}, goal={"throughput": None, "memory": "72%"}, export=["hf", "nemotron-nas"],
        solve={"precision": ["bf16", "fp8"], "also": [], "explain": False},
    )  # fmt: skip
    if healed != "heal":
        value = yaml.safe_load(recipe.read_text())
        recipe.write_text(yaml.safe_dump(value | {"after": {"short": {"heal": value["heal"]}}, "heal": None}))
    done = puzzle("run", recipe, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["seconds"]) == [
        "build-library", "score", "profile bf16", "profile fp8", "solve", "child", healed, "quantised", "export nemotron-nas", "evaluate",
    ]  # fmt: skip
    solved = read_architecture(tmp_path / "run" / "solution")
    assert solved.fp8_weights
    assert result["exports"]["hf"] == "quantised"
    for name in ("quantised", "exports/nemotron-nas"):
        said = json.loads((tmp_path / "run" / name / "config.json").read_text())["quantization_config"]
        assert (said["kv_cache_scheme"] is not None) == (solved.kv_dtype == "fp8")
    for name in ("child", "healed" if healed == "heal" else "after/short"):
        assert "quantization_config" not in json.loads((tmp_path / "run" / name / "config.json").read_text())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"profile": {"gpu": "h100", "precision": "fp8"}}, "profile.precision is not used with solve.precision"),
        ({"profile": {"gpu": "h100"}, "fuse": {"sequences": 4}}, "fuse is not used with solve.precision"),
        ({"profile": {"gpu": "cpu"}}, "precision bf16 cannot be profiled on cpu"),
        (
            {"profile": {"gpu": "h100"}, "export": ["gguf"]},
            "export gguf: solve.precision may choose fp8, which llama.cpp does not read: give it a dtype",
        ),
        (
            {"profile": {"gpu": "h100"}, "export": ["qwen3-moe"]},
            "export qwen3-moe: solve.precision may choose fp8, which qwen3-moe does not read: give it a dtype",
        ),
        ({"solve": {"precision": "bf16,int8"}}, "solve.precision bf16,int8: "),
    ],
)
def test_what_goes_with_no_precision(puzzle, write, one_line_error, monkeypatch, tmp_path, changed, message):
    monkeypatch.setattr(check, "check_gpu", lambda gpu: None)
    recipe = write(**{"solve": {"precision": "bf16,fp8", "also": [], "explain": False}, "heal": None, **changed})
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()
