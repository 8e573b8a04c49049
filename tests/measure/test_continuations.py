"""What parent and child make of a prompt: sampled alike, shown side by side, refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzle.measure import continuations as module
from puzzle.measure.continuations import NEW_TOKENS, continuations
from puzzle.runtime.model import load_model

COLD = 1e-4  # a temperature at which the likeliest token is drawn
COMMON = ("--sequences", 2, "--seq-len", 32, "--no-speed", "--device", "cpu")


def test_a_cold_sample_is_what_transformers_generates(parent, monkeypatch):
    monkeypatch.setattr(module, "TEMPERATURE", COLD)
    tokenizer, theirs = AutoTokenizer.from_pretrained(parent), AutoModelForCausalLM.from_pretrained(parent)
    prompt = "import os\n"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    greedy = theirs.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
    [text] = continuations({"parent": load_model(parent)}, [prompt], parent)["texts"]
    assert text == {"prompt": prompt, "parent": tokenizer.decode(greedy, skip_special_tokens=True)}


def test_evaluate_shows_them(puzzle, parent, child, corpus):
    """The same every time; a model beside itself says the same twice."""
    asked = ("--data", corpus, *COMMON, "--prompt", "import os\n", "--prompt", "class [b]")
    found = [json.loads(puzzle("evaluate", parent, child, *asked, "--json").stdout)["continuations"] for _ in range(2)]
    assert found[0] == found[1]
    assert [text["prompt"] for text in found[0]["texts"]] == ["import os\n", "class [b]"]
    assert found[0]["temperature"] == module.TEMPERATURE
    assert any(text["parent"] != text["child"] for text in found[0]["texts"])
    itself = json.loads(puzzle("evaluate", parent, parent, *asked, "--json").stdout)["continuations"]["texts"]
    assert [text["child"] for text in itself] == [text["parent"] for text in found[0]["texts"]]
    shown = puzzle("evaluate", parent, child, *asked).stderr
    assert "sampled at temperature 0.7, seed 0" in shown
    assert "class [b]" in shown
    assert "continuations" not in json.loads(
        puzzle("evaluate", parent, child, "--data", corpus, *COMMON, "--json").stdout
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "--prompt has an empty one (''): write how a text begins"),
        (" \n", "--prompt has an empty one"),
        (
            "ab " * 200,
            "--prompt has one of 401 tokens: with 48 more they exceed the parent's context of 256; shorten it",
        ),
        ("x\udcff", "--prompt 'x\\udcff' is no text in UTF-8"),
    ],
    ids=["empty", "blank", "long", "bytes"],
)
def test_prompts_that_are_refused(puzzle, one_line_error, parent, child, corpus, prompt, message):
    asked = ("--data", corpus, *COMMON, "--prompt", "import os", "--prompt", prompt)
    one_line_error(puzzle("evaluate", parent, child, *asked), message)


@pytest.mark.parametrize("which", ["parent", "child"])
def test_a_model_of_no_numbers_is_named(puzzle, one_line_error, parent, child, corpus, tmp_path, poison, which):
    """Weights that are numbers, and logits that are none; with --json as without."""
    models = {"parent": parent, "child": child}
    models[which] = shutil.copytree(models[which], tmp_path / "broken")
    poison(models[which], "model.norm.weight", lambda scale: torch.full_like(scale, 3e38))
    for more in ((), ("--json",)):
        one_line_error(
            puzzle("evaluate", *models.values(), "--data", corpus, *COMMON, *more),
            "broken gives logits that are no numbers",
        )
