"""Reference parents with experts: as they train and as they are read, and the script that trains them from end to end."""

from __future__ import annotations

import importlib
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from made_up_files import write_files
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h_moe"])
def test_modules_in_training_are_those_that_are_served(family):
    """Values and gradients, of every kind that trains otherwise; in float32, but for the autocast that a GPU has."""
    mixtures = importlib.import_module("mixtures")
    structure = mixtures.structure_of(family, mixtures.NUM_LAYERS[family], 64, 256)
    assert structure.num_parameters * 2 < 32e6
    full = mixtures.structure_of(family, mixtures.NUM_LAYERS[family], 4096, 1024)
    assert 14e6 < full.num_parameters < 16e6
    torch.manual_seed(0)
    for sub_block in {b for _, _, b in structure if isinstance(b, Moe | Mamba2)}:
        with torch.no_grad():
            trained, served = mixtures.part_of(sub_block), sub_block.module()
        served.load_state_dict(trained.state_dict())
        x, found = torch.randn(2, 192, structure.hidden_size), []
        for part in (trained, served):
            y = part(x, {})
            y.square().sum().backward()
            found.append({"y": y.detach()} | {n: p.grad for n, p in part.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, tensor in found[1].items():
            assert (found[0][name] - tensor).norm() <= 1e-4 * tensor.norm() + 1e-9, (sub_block.kind, name)


def train(family, out, files, monkeypatch):
    """The script's outcome on `files`: which files a machine has, and which of them are held out, is not what is tested."""
    script = importlib.import_module("train_parent")
    monkeypatch.setattr(script, "corpus_files", lambda: (files, {"these files": "Apache-2.0"}))
    ticks = itertools.count()  # a look at the clock each step takes a tenth of a second: as many steps on every machine
    monkeypatch.setattr(script, "time", SimpleNamespace(time=lambda: next(ticks) / 10, strftime=time.strftime))
    monkeypatch.setattr(script, "T", 128)
    monkeypatch.setattr(script, "PROMPTS", script.PROMPTS[:1])
    words = ["--family", family, "--out", out, "--seconds", 1, "--batch", 2, "--layers", 6]
    return CliRunner().invoke(script.main, list(map(str, words)))


@pytest.mark.parametrize("words", [("--tokens", "nan"), ("--batch", 0), ("--lr", -1), ("--layers", 0)])
def test_sizes_that_cannot_be_are_refused_before_anything_is_read(tmp_path, monkeypatch, words):
    script = importlib.import_module("train_parent")
    monkeypatch.setattr(script, "corpus_files", None)
    done = CliRunner().invoke(script.main, ["--out", str(tmp_path / "parent"), *map(str, words)])
    assert (done.exit_code, done.output) == (1, f"Error: {words[0]} {words[1]}: must be above 0\n")


def test_a_corpus_of_which_nothing_is_held_out_is_refused(tmp_path, monkeypatch):
    done = train("qwen3_moe", tmp_path / "parent", write_files(tmp_path, 1), monkeypatch)
    assert done.exit_code == 1
    assert "documents to train on and" in done.output
    assert "give more --max-files" in done.output
    assert not (tmp_path / "parent").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron_h_moe"])
def test_a_reference_parent_is_trained(family, tmp_path, monkeypatch):
    """A plain checkpoint within the time that was given: transformers and we read the same from it, and its experts stay even."""
    (tmp_path / "text").mkdir()
    files, tmp_path = write_files(tmp_path / "text", 60), tmp_path / "parent"
    done = train(family, tmp_path, files, monkeypatch)
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == family.removesuffix("_moe") if family.startswith("nemotron") else family
    ids = AutoTokenizer.from_pretrained(tmp_path)("def main():\n    return 0\n", return_tensors="pt")["input_ids"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    mixtures = [b for _, _, b in open_model(tmp_path).structure if isinstance(b, Moe)]
    card = (tmp_path / "README.md").read_text()
    assert "license: apache-2.0" in card
    rows = (tmp_path / "training.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "21"]
    assert 1 <= float(rows[-1].split(",")[-1]) <= mixtures[0].num_experts / mixtures[0].num_experts_per_tok
    assert float(rows[-1].split(",")[2]) <= float(rows[1].split(",")[2])
