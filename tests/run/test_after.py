"""What a recipe does after the healing: its own stages, and its sizes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from puzzle.base.errors import UserError
from puzzle.parents.known import known_structure
from puzzle.run.recipe import read_recipe
from puzzle.run.shapes import MFU

ROOT = Path(__file__).parents[2]
COPY = (
    "import shutil, sys\n"
    "child, out, count = sys.argv[1:]\n"
    "with open(count, 'a') as lines: print(child, file=lines)\n"
    "shutil.copytree(child, out + '/copy')\n"
    "print('said')\n"
)
HEAL = {"tokens": 512, "seq_len": 32, "batch_size": 4, "validation_sequences": 4}


def recipe_of(write, tmp_path, **changed):
    (tmp_path / "copy.py").write_text(COPY)
    after = {
        "text": {"heal": {**HEAL, "kl_weight": 0, "cosine_weight": 0, "lm_weight": 1}},
        "copy": {"command": "python {here}/copy.py {child} {out} {run}/count", "result": "copy", "trains": "1e6", "samples": 1e6},
        "look": {"command": "python -c 'import sys; print(1)' {child} {parent}"},
    }  # fmt: skip
    solve = {"also": [], "explain": False}
    return write(solve=solve, goal={"throughput": None, "params": "70%"}, export=None, after=after, **changed)


def test_each_has_the_child_of_the_last(puzzle, one_line_error, write, tmp_path):
    recipe, out = recipe_of(write, tmp_path), tmp_path / "run"
    one_line_error(puzzle("run", recipe, "--out", out), "after.copy.command runs a program", "pass --run-commands")
    assert not out.exists()
    planned = puzzle("run", recipe, "--out", out, "--dry-run", "--json")
    stages = json.loads(planned.stdout)["stages"]
    assert [name for name in stages if name.startswith("after")] == ["after text", "after copy", "after look"]
    text, copy, look = (stages[f"after {name}"] for name in ("text", "copy", "look"))
    assert (text["tokens"], copy["tokens"], look["tokens"]) == (512, 1_000_000, None)
    assert (copy["memory_bytes"], text["disk_bytes"] > copy["disk_bytes"] > 0) == (text["memory_bytes"], True)
    assert copy["seconds"] > text["seconds"] > 0
    assert look["seconds"] is look["memory_bytes"] is look["disk_bytes"] is None
    done = puzzle("run", recipe, "--out", out, "--run-commands", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    assert result["exports"] == {"hf": "after/copy/copy"}
    assert (out / "count").read_text() == f"{out / 'after/text'}\n"
    losses = json.loads((out / "after/text/heal.json").read_text())["after"]
    assert (losses["loss"], result["healed"]["num_tokens"]) == (pytest.approx(result["child"]["loss"], abs=0.05), 1024)
    again = puzzle("run", recipe, "--out", out, "--run-commands")
    assert (again.exit_code, len((out / "count").read_text().splitlines())) == (0, 1)
    assert puzzle("report", out).exit_code == 0
    # an earlier stage that changes makes the later ones anew
    other = recipe_of(write, tmp_path, heal={"lr": 1e-3})
    assert puzzle("run", other, "--out", out, "--run-commands").exit_code == 0
    assert len((out / "count").read_text().splitlines()) == 2


def is_free(lock: Path) -> bool:
    """No process holds it, nor one that it has started."""
    with open(lock, "a") as handle, contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def test_a_command_that_outlives_us(puzzle, one_line_error, write, tmp_path, launch, ended, wait):
    """After kill -9 no second one is started beside it; in directories with spaces, its own program beside the recipe."""
    recipe = recipe_of(write, tmp_path, heal=None)
    value, here, out = yaml.safe_load(recipe.read_text()), tmp_path / "a {b} c", tmp_path / "my run"
    here.mkdir()
    program = here / "wait.sh"
    program.write_text(
        '#!/bin/sh\necho said; touch "$1/begun"; while [ ! -e "$1/go" ]; do sleep 0.05; done; touch "$1/ended"\n'
    )
    program.chmod(0o755)
    value["after"] = {"wait": {"command": "{here}/wait.sh {out}"}}
    recipe = here / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(value))
    stage, call = out / "after" / "wait", ("run", recipe, "--out", out, "--run-commands")
    [process] = launch(call)
    wait((stage / "begun").exists, process)
    process.kill()
    ended([process])
    done = puzzle(*call)
    assert done.exit_code == 2
    assert "after/wait is being changed by the command that a run before" in done.stderr.replace("\n", " ")
    (stage / "go").touch()
    wait((stage / "ended").exists)
    wait(lambda: is_free(stage.with_name("wait.lock")))
    done = puzzle(*call, "--json")
    assert (done.exit_code, json.loads(done.stdout)["after"]) == (0, {"wait": "after/wait"})
    assert not list(out.rglob("*.lock"))


@pytest.mark.parametrize(
    ("command", "result", "told"),
    [
        ("{out}/none", None, "after.copy.command cannot be run: "),
        ("python -c 'import sys; sys.exit(3)'", None, "after.copy.command ended with 3: "),
        ("python -c 1", "nothing", "after.copy.command left no checkpoint at after.copy.result nothing: "),
    ],
)
def test_a_command_that_fails(puzzle, one_line_error, write, tmp_path, command, result, told):
    recipe = recipe_of(write, tmp_path)
    value = yaml.safe_load(recipe.read_text())
    value["after"] = {"copy": {"command": command, "result": result}}
    recipe.write_text(yaml.safe_dump(value))
    for _ in range(2):  # it is not taken for done
        done = puzzle("run", recipe, "--out", tmp_path / "run", "--run-commands")
        assert done.exit_code == 2
        assert told in done.stderr.replace("\n", " ")
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ([], "'after' is [], it must be sections by name"),
        ({"a b": {"command": "x"}}, "it must be sections by name"),
        ({"a": 3}, "after.a is 3, it must be a section"),
        ({"a": {}}, "after.a.heal and after.a.command: a stage has one of them"),
        ({"a": {"command": "x", "heal": {}}}, "after.a.heal and after.a.command: a stage has one of them"),
        ({"a": {"heal": {"tokens": 0}}}, "after.a.heal.tokens"),
        ({"a": {"heal": {}, "result": "x"}}, "after.a.result x: a healing's result is known"),
        ({"a": {"heal": {}, "seq_len": 4096}}, "after.a.seq_len 4096: a healing's seq_len is known from after.a.heal"),
        ({"a": {"command": "python", "result": "../x"}}, "after.a.result ../x: must be a path in {out}"),
        ({"a": {"command": "python", "result": "/x"}}, "after.a.result /x: must be a path in {out}"),
        ({"a": {"command": "x {out[b]}"}}, "after.a.command x {out[b]}: "),
        ({"a": {"command": "{here}/none"}}, "/none here: install it"),
        ({"a": {"command": "python {run}/after/b/x"}, "b": {"command": "python"}}, "no stage b comes before it"),
        (
            {"a": {"heal": {"kl_weight": 0, "reverse_kl": 0.5}}},
            "after.a.heal.reverse_kl 0.5 is not used with after.a.heal.kl_weight 0",
        ),
        ({"a": {"heal": {"kl_weight": 0, "temperature": 2}}}, "after.a.heal.temperature 2 is not used with"),
        ({"a": {"heal": {"top_k": 8}}}, "after.a.heal.top_k 8 is not used with no after.a.heal.teacher_logits"),
        ({"a": {"heal": {"child": "x"}}}, "unknown key 'after.a.heal.child'"),
        ({"a": {"comand": "x"}}, "unknown key 'after.a.comand'; did you mean 'command'"),
        ({"a": {"command": "x {who}"}}, "after.a.command x {who}: 'who'; known: {child}, {out}"),
        ({"a": {"command": "x {"}}, "after.a.command x {: "),
        ({"a": {"command": "x '"}}, "after.a.command x ': "),
        ({"a": {"command": " "}}, "after.a.command is empty"),
        ({"a": {"command": "x", "trains": -1}}, "after.a.trains -1: must not be negative"),
        ({"a": {"command": "x", "seq_len": 0}}, "after.a.seq_len 0: must be above 0"),
        ({"a": {"command": "no-such-program-here"}}, "no program no-such-program-here here"),
        ({"a": {"command": "python {here}/none.py"}}, "none.py is not there"),
    ],
)
def test_what_is_refused(puzzle, one_line_error, write, tmp_path, after, told):
    """Before anything is built."""
    recipe = write(after=after) if isinstance(after, dict) and after else write()
    if not after:
        recipe.write_text(recipe.read_text() + "after: []\n")
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run", "--run-commands"), told)
    assert not (tmp_path / "run").exists()


def test_sizes(puzzle, one_line_error, tmp_path):
    path = tmp_path / "r.yaml"
    value = {
        "parent": "p", "heal": {"tokens": 10, "lr": 1e-3}, "after": {"a": {"command": "x"}, "b": {"command": "y"}},
        "sizes": {"small": {"heal": {"tokens": 5}, "after": {"a": None, "b": {"trains": 7}}}, "8": {"parent": "q", "heal": None}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(value))
    one, other, third = (read_recipe(path, size) for size in (None, "small", "8"))
    assert (one.heal.tokens, other.heal.tokens, other.heal.lr, third.heal, third.parent) == (10, 5, 1e-3, None, "q")
    assert (list(one.after), list(other.after), other.after["b"].trains) == (["a", "b"], ["b"], 7)
    with pytest.raises(UserError, match=r"r\.yaml: no `size` smal; did you mean 'small'\?"):
        read_recipe(path, "smal")
    one_line_error(puzzle("run", path, "--size", "x", "--out", tmp_path / "run"), "no --size x; known: 8, small")
    for wrong, told in (
        ({"small": 3}, "'sizes' must be sections by name"),
        ({"small": {"heel": {}}}, "sizes.small: unknown key 'heel'; did you mean 'heal'"),
        ({"small": {"heal": {"tokens": "x"}}}, "sizes.small: heal.tokens is 'x'"),
    ):
        path.write_text(yaml.safe_dump(value | {"sizes": wrong}))
        one_line_error(puzzle("run", path, "--out", tmp_path / "run"), told)
    path.write_text("parent: p\nsizes: {on: {heal: {tokens: 3}}, 010: {text_field: q}, 1_0: {data: [a, b]}}\n")
    sizes = {size: read_recipe(path, size) for size in ("on", "010", "1_0")}  # names as they are written
    assert (sizes["on"].heal.tokens, sizes["010"].text_field, sizes["1_0"].data) == (3, "q", ["a", "b"])
    path.write_text(yaml.safe_dump({"parent": "p"}))
    one_line_error(puzzle("run", path, "--size", "x", "--out", tmp_path / "run"), "no --size x; it has none")


@pytest.mark.parametrize(("size", "tokens"), [("8b", [40e9]), ("70b", [40e9]), ("405b", [65e9, 88e9])])
def test_the_road_of_llama_nemotron(puzzle, tmp_path, size, tokens):
    """Budgets of distillation and pre-training of the papers, in hours of a pass forward and back of every token."""
    path = ROOT / "examples/llama_nemotron.yaml"
    done = puzzle("run", path, "--size", size, "--out", tmp_path / "run", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    stages = [found["stages"][name] for name in ("heal", "after pretrain")[: len(tokens)]]
    assert [row["tokens"] for row in stages] == pytest.approx(tokens, rel=1e-4)
    least = (
        known_structure(found["shapes"]).num_parameters * 6 / (MFU * 989e12) / 3600
    )  # forward and backward, no attention
    assert stages[-1]["gpu_hours"] > least * tokens[-1] * 0.95
    grpo, sft, rate = (found["stages"][f"after {name}"] for name in ("grpo", "sft", "rate"))
    assert (grpo["gpu_hours"] == 140e3, grpo["told"]) == (size == "405b",) * 2
    assert (sft["disk_bytes"], rate["disk_bytes"]) == (found["stages"]["child"]["disk_bytes"], None)
    assert rate["gpu_hours"] > 0
    shown = puzzle("run", path, "--size", size, "--out", tmp_path / "run", "--dry-run").output.replace("\n", " ")
    assert ("after grpo: hours as the recipe says them" in shown) is (size == "405b")
    assert "tokens that are sampled count as read ones" in shown


def test_its_scripts_are_there():
    """The commands of the recipe that ships, in its own words."""
    recipe = read_recipe(ROOT / "examples/llama_nemotron.yaml")
    for one in recipe.after.values():
        if one.command is not None:
            one.check_there(recipe.here, list(recipe.after))
    assert shlex.split(recipe.after["sft"].command)[0] == "python"
    assert recipe.after["sft"].words(dict.fromkeys(("child", "out", "parent", "here", "run"), "x"))[0] == sys.executable


def test_what_changed_nothing_stays_and_what_is_done_again_is_followed(puzzle, one_line_error, write, tmp_path):
    """Solving again takes other seconds, and gives the same child: its healing and what came after stay. A command whose directory was
    removed may give something else, so that the stages after it run again."""
    recipe, out = recipe_of(write, tmp_path), tmp_path / "run"
    call = ("run", recipe, "--out", out, "--run-commands")
    assert puzzle(*call).exit_code == 0
    lines = lambda: len((out / "count").read_text().splitlines())  # noqa: E731
    healed = (out / "healed/heal.json").stat().st_mtime_ns
    for removed in ("solution", "child"):
        shutil.rmtree(out / removed)
        assert puzzle(*call).exit_code == 0
        assert (lines(), (out / "healed/heal.json").stat().st_mtime_ns) == (1, healed)
    looked = (out / "after/look").stat().st_mtime_ns
    shutil.rmtree(out / "after/copy")
    assert puzzle(*call).exit_code == 0
    assert (lines(), (out / "after/look").stat().st_mtime_ns != looked) == (2, True)
    assert (puzzle(*call).exit_code, lines()) == (0, 2)
    path = out / "stages.json"
    for broken in ({"schema": 1}, {"schema": 1, "stages": []}, {"schema": 1, "stages": {"heal": {}}}):
        path.write_text(json.dumps(broken))
        done = puzzle(*call)
        assert done.exit_code == 2
        assert "stages.json does not say what is done" in done.stderr.replace("\n", " ")
