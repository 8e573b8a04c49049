"""Times of a runtime are those of what it was asked for: one step in place, one prefill of every sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import step_times
from puzzle.parents.known import known_structure
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import random_model


@pytest.fixture
def runtime():
    structure = known_structure("reference")
    structure = replace(structure, vocab_size=64, layers=structure.layers[:1])
    return FastRuntime(random_model(structure, "cpu", torch.float32), batch=2, max_length=40)


def test_a_step_stays_at_its_context(runtime):
    seconds = step_times.decode_step_seconds(runtime, 33, seconds=0.0)
    assert seconds > 0
    assert runtime.batch.positions.tolist() == [33, 33]


def test_a_prefill_is_of_every_sequence(runtime, monkeypatch):
    prompts = []
    own = runtime.prefill
    monkeypatch.setattr(runtime, "prefill", lambda ids: prompts.append(ids) or own(ids))
    assert step_times.prefill_seconds(runtime, 17, seconds=0.0) > 0
    assert {tuple(ids.shape) for ids in prompts} == {(2, 17)}
    assert runtime.batch.positions.tolist() == [17, 17]
