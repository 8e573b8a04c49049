"""The reference mixture of experts that the repository holds: what its card says of it, and that it has learnt Python."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "parent_moe"


def test_what_it_is():
    structure = open_model(MODEL).structure
    assert structure.num_parameters == 14_858_112
    assert f"{structure.num_parameters:,}" in (MODEL / "README.md").read_text(encoding="utf-8")
    assert {layer["ffn"].kind for layer in structure.layers} == {"moe"}
    assert structure.num_layers == 10


def test_logits_and_loss():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(Path(json.__file__).read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :257]
    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits, wanted = load_model(MODEL)(ids), theirs(ids).logits
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 3, "a docstring of the standard library, at less than a third of ln 4096"
