"""Prompts that go through our forward together answer as each alone."""

from __future__ import annotations

import numpy
import torch

from puzzle.runtime.model import load_model


def test_prompts_together_and_alone(load_script, parent):
    script = load_script("serving/fp8_logprobs.py")
    model, random = load_model(parent), numpy.random.default_rng(0)
    prompts = [random.integers(5, model.structure.vocab_size, size=size) for size in (17, 40, 5, 33, 60, 17)]
    assert script.alike([len(p) for p in prompts], 2) == [[2], [0, 5, 3], [1, 4]]
    assert script.alike([len(p) for p in prompts], 1) == [[2], [0, 5], [3], [1], [4]]
    together, texts = script.answered(model, prompts, "cpu")
    for prompt, last, text in zip(prompts, together, texts, strict=True):
        one, same = script.answered(model, [prompt], "cpu")
        assert numpy.abs(one[0] - last).max() < 1e-4
        assert same[0].tolist() == text.tolist()
        plain = torch.log_softmax(model(torch.tensor(prompt)[None])[0, -1], -1).detach().numpy()
        assert numpy.abs(plain - last).max() < 1e-4
