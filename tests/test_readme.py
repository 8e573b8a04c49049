"""What the README tells people to type works, at a tiny size: same verbs, same flags, smaller numbers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "build-library": ["--tokens", "512", "--seq-len", "64", "--batch-size", "2", "--calibration-sequences", "2"],
    "profile": ["--batches", "1,2", "--seconds", "0.005", "--rounds", "1"],
    "solve": ["--throughput", "1.02x"],
    "evaluate": ["--sequences", "2", "--seq-len", "64", "--batch", "1,1", "--repeats", "1"],
}
SETS = {
    "hellaswag.jsonl": {"activity_label": "a", "ctx": "b", "endings": ["c", "d"], "label": 0},
    "truthfulqa_mc1.jsonl": {"question": "a", "choices": ["c", "d"], "expected_index": 1},
    "HumanEval.jsonl": {"prompt": "def f():\n", "test": "def check(f): ...", "entry_point": "f"},
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every `puzzle ...` line of the README, in order, as arguments."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("puzzle ")]


def test_there_are_five_verbs_in_the_walk_through():
    assert [c[0] for c in commands()][:5] == ["build-library", "profile", "solve", "export", "evaluate"]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"^make ([a-z]+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert used
    assert used <= targets


def test_options_that_it_names_exist():
    """Of every verb, also in what is shown and not run here."""
    from puzzle.cli import main

    shown = re.findall(r"\bpuzzle ([a-z-]+)((?: [^\n`;&|#]*)?)", README.replace("\\\n", " "))
    assert len({verb for verb, _ in shown}) > 5
    for verb, rest in shown:
        if verb in main.commands:
            known = {flag for option in main.commands[verb].params for flag in (*option.opts, *option.secondary_opts)}
            assert set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest)) <= known | {"--help"}, f"puzzle {verb}{rest}"


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("path", re.findall(r"`(?:[^`\n]* )?((?:benchmarks|examples|docs|puzzle)/[^`* \n]+)", README))
def test_files_that_it_names_exist(path):
    """Alone or in a command."""
    assert (ROOT / path).exists()


def test_every_command_runs(puzzle, make_parent, corpus, tmp_path, monkeypatch):
    parent = make_parent(tmp_path / "parent", corpus, max_position_embeddings=1024)
    (tmp_path / "corpus").mkdir()
    rows = [json.dumps({"text": path.read_text()}) for path in sorted(corpus.glob("*.py"))]
    (tmp_path / "corpus" / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "sets").mkdir()
    for name, row in SETS.items():
        (tmp_path / "sets" / name).write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    here = {"examples/parent": str(parent), "meta-llama/Llama-3.1-8B": str(parent), "/usr/lib/python3": str(corpus)}
    for command in commands():
        arguments = [here.get(a, a) for a in command]
        # the frontier sets its own limit
        smaller = [] if {"--pareto", "--tasks"} & {*command} else SMALLER.get(command[0], [])
        result = puzzle(*arguments, *smaller)
        assert result.exit_code == 0, f"{command}: {result.output}"
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
