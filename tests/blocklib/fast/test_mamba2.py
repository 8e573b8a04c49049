"""Hybrids in the runtime on our kernels (their plain twins, on a CPU) against the plain one."""

from __future__ import annotations

import pytest
import torch

from puzzle.runtime import fast
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import load_model
from puzzle.runtime.plain import PlainRuntime
from tiny_parents import write_tiny_parent


@pytest.mark.parametrize("name", ["nemotron_h", "nemotron_h with biases, attention first"])
@pytest.mark.parametrize("length", [1, 2, 21])
def test_same_tokens_as_the_plain_runtime(name, length, tmp_path, monkeypatch):
    """Prompts together and in groups of two; as many bytes of states."""
    model = load_model(write_tiny_parent(name, tmp_path, hidden_size=64, intermediate_size=96, head_dim=16))
    prompts = torch.randint(2, 384, (5, length), generator=torch.Generator().manual_seed(length))
    plain = PlainRuntime(model, 5, length + 20)
    want = plain.generate(prompts, 20)
    assert torch.equal(FastRuntime(model, 5, length + 20).generate(prompts, 20), want)
    monkeypatch.setattr(fast, "PREFILL_ROWS", 2 * length + 1)
    assert torch.equal(FastRuntime(model, 5, length + 20).generate(prompts, 20), want)
    own = [part.state_bytes for part in FastRuntime(model, 5, length + 20).parts if part.sub_block.kind == "mamba2"]
    states = [state for state, part in zip(plain.states, plain.parts, strict=True) if part.sub_block.kind == "mamba2"]
    assert own == [state.num_bytes for state in states]
