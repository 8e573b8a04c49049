"""The runtime on our kernels (their plain twins, on a CPU) against the plain one, on a model with every kind of sub-block."""

from __future__ import annotations

import pytest
import torch

from puzzle.runtime import fast
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.plain import PlainRuntime


@pytest.mark.parametrize("length", [5, 70])
def test_same_tokens_as_the_plain_runtime(mixed, length):
    prompts = torch.randint(0, 384, (3, length), generator=torch.Generator().manual_seed(1))
    want = PlainRuntime(mixed, 3, length + 40).generate(prompts, 40)
    assert torch.equal(FastRuntime(mixed, 3, length + 40).generate(prompts, 40), want)


def test_prompts_in_groups_change_nothing(mixed, monkeypatch):
    prompts = torch.randint(0, 384, (5, 20), generator=torch.Generator().manual_seed(2))
    want = FastRuntime(mixed, 5, 60).generate(prompts, 12)
    monkeypatch.setattr(fast, "PREFILL_ROWS", 47)  # two prompts at a time
    assert torch.equal(FastRuntime(mixed, 5, 60).generate(prompts, 12), want)


def test_fp8_stays_close(mixed):
    prompts = torch.randint(0, 384, (2, 30), generator=torch.Generator().manual_seed(3))
    runtimes = [FastRuntime(mixed, 2, 40, fp8=fp8) for fp8 in (False, True)]
    found = []
    for runtime in runtimes:
        runtime.prefill(prompts)
        seen = []
        runtime._next = lambda stream, seen=seen: seen.append(stream) or torch.zeros(2, dtype=torch.long)  # type: ignore[method-assign]
        runtime.step_in_place()
        found.append(seen[0][0] + seen[0][1])
    assert runtimes[1].state_bytes * 4 == runtimes[0].state_bytes
    difference = (found[1] - found[0]).norm() / found[0].norm()
    assert 1e-4 < difference < 0.2
