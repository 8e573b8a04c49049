"""The runtime on our kernels (their plain twins, on a CPU) against the plain one, on a model with every kind of sub-block."""

from __future__ import annotations

import pytest
import torch

from puzzle.runtime import fast
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.interface import Fp8
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


def test_a_step_is_timed_from_the_same_words(mixed):
    """Others in every sequence, which stay: a mixture of random weights would soon have the same few experts for all."""
    runtime = FastRuntime(mixed, 16, 40)
    runtime.randomize()
    runtime.at(20)
    before = runtime.ids.clone()
    assert len(before.unique()) > 8
    for _ in range(3):
        runtime.step_again()
    assert torch.equal(runtime.ids, before)
    chosen = runtime.unused.clone()
    assert runtime.batch.positions.tolist() == [20] * 16
    assert not torch.equal(chosen, before)


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


def test_each_sub_block_in_its_own_precision(mixed):
    """All of them named is the whole in fp8, none is none of it; the cache goes by itself."""
    prompts = torch.randint(0, 384, (2, 30), generator=torch.Generator().manual_seed(3))
    every = frozenset((layer, slot) for layer, slot, _ in mixed.parts())

    def logits(fp8) -> tuple[torch.Tensor, int]:
        runtime, seen = FastRuntime(mixed, 2, 40, fp8=fp8), []
        runtime.prefill(prompts)
        runtime._next = lambda stream: seen.append(stream[0] + stream[1]) or torch.zeros(2, dtype=torch.long)  # type: ignore[method-assign]
        runtime.step_in_place()
        return seen[0], runtime.state_bytes

    whole, none = logits(True), logits(False)
    assert torch.equal(logits(Fp8(weights=every, cache=True))[0], whole[0])
    assert torch.equal(logits(Fp8(weights=frozenset(), cache=False))[0], none[0])
    cached, weighted, one = (
        logits(Fp8(weights=w, cache=c)) for w, c in ((frozenset(), True), (every, False), ({(3, "ffn")}, False))
    )
    assert (cached[1], weighted[1]) == (whole[1], none[1])
    found = [none[0], whole[0], cached[0], weighted[0], one[0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert all((other - none[0]).norm() < 0.2 * none[0].norm() for other in found)


def test_hidden_is_the_plain_ones(mixed, monkeypatch):
    """Of every token, of fewer prompts than the batch holds, in groups; in fp8 close to it. And samples are the plain ones."""
    monkeypatch.setattr(fast, "PREFILL_ROWS", 47)
    prompts = torch.randint(0, 384, (3, 20), generator=torch.Generator().manual_seed(4))
    plain, runtime = PlainRuntime(mixed, 4, 60), FastRuntime(mixed, 4, 60)
    want = plain.hidden(prompts)
    torch.testing.assert_close(runtime.hidden(prompts), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(runtime.head, plain.head)
    far = (FastRuntime(mixed, 4, 60, fp8=True).hidden(prompts) - want).norm() / want.norm()
    assert 1e-4 < far < 0.2
    noise = torch.empty(4, 384).exponential_(generator=torch.Generator().manual_seed(5))
    for one in (plain, runtime):
        one.noise, one.temperature = noise, torch.full((4, 1), 0.9)
    four = torch.cat((prompts, prompts[:1]))
    said = [one.generate(four, 5) for one in (plain, runtime)]
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0][0], said[0][3])  # the same prompt, other numbers
