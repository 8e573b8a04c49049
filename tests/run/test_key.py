"""A run typed in another way goes on where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from puzzle.heal.settings import HealOptions
from puzzle.run.key import key_of


def test_paths_count_as_what_they_lead_to(tmp_path, monkeypatch):
    (tmp_path / "texts/sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    typed = ["texts", str(tmp_path / "texts"), "./texts", "texts/sub/..", "link"]
    assert len({key_of(HealOptions(child=one, data=[one, f"{one}/*.py"], out=Path(one, "out"))) for one in typed}) == 1
    assert key_of({"teacher": "texts"}) != key_of({"teacher": "texts/sub"})
    assert key_of({"data": "a/name"}) != key_of(
        {"data": str(tmp_path / "a/name")}
    )  # of a dataset or a hub, not a place here
    assert key_of({"parallel": "texts"}) != key_of({"parallel": "link"})
    assert key_of(1.0, None, "a") != key_of(1.5, None, "a")


def test_a_run_typed_in_another_way(puzzle, write, parent, corpus, tmp_path, monkeypatch):
    """Relative, through `..` and a symbolic link: every stage is done already."""
    here = tmp_path / "here"
    here.mkdir()
    shutil.copytree(parent, here / "parent")
    (here / "texts").symlink_to(corpus)
    (tmp_path / "link").symlink_to(here)
    blend = {"sources": [{"path": "texts", "max_epochs": 4}]}
    (here / "blend.yaml").write_text(yaml.safe_dump(blend))
    recipe = write(
        parent="parent", data="texts", build={"attention": "none", "ffn": "0.5"}, export=["hf", "nemotron-nas"],
        goal={"throughput": None, "params": "57%"}, heal={"blend": "blend.yaml", "cosine_weight": 0},
        fuse={"max_dependency": 1.9, "keep_last": False, "sequences": 4, "seq_len": 32},
        after={"again": {"heal": {"tokens": 256, "seq_len": 32, "batch_size": 4, "cosine_weight": 0}}},
    )  # fmt: skip
    recipe.rename(here / "recipe.yaml")
    monkeypatch.chdir(here)
    done = puzzle("run", "recipe.yaml", "--out", "run")
    assert done.exit_code == 0, (done.output, done.exception)
    marks = json.loads((here / "run/stages.json").read_text())["stages"]
    monkeypatch.chdir(tmp_path)
    for typed in (here, Path("here/../link"), tmp_path / "link"):
        done = puzzle("run", typed / "recipe.yaml", "--out", typed / "run")
        assert done.exit_code == 0, (done.output, done.exception)
        found = json.loads((here / "run/stages.json").read_text())["stages"]
        assert {name for name in marks if found[name]["key"] != marks[name]["key"]} == set()
        assert (
            done.stderr.count("done already") == len(marks) - 3
        )  # build-library, score and evaluate know by themselves
        assert str(typed / "run") in done.stderr.replace("\n", "")
