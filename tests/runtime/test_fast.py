"""The static-batch runtime against the plain one, on a model with every kind of sub-block."""

from __future__ import annotations

import pytest
import torch

from puzzle.base.workload import Workload
from puzzle.measure.serve import serve
from puzzle.parents.known import Shapes
from puzzle.runtime import fast as fast_model
from puzzle.runtime.fast import FastRunner, random_module, random_stack, stack_of
from puzzle.runtime.model import CausalModel, load_model
from puzzle.runtime.plain import Runner

MIXED = {0: ("attention", "kv1"), 1: ("attention", "none"), 2: ("attention", "window-24"), 3: ("ffn", "linear")}


@pytest.fixture(scope="module")
def mixed(parent) -> CausalModel:
    """The tiny parent with other sub-blocks in every layer."""
    torch.manual_seed(0)
    model = load_model(str(parent), dtype=torch.float32)
    for index, (kind, name) in MIXED.items():
        setattr(model.blocks[index], kind, random_module(kind, name, model.spec, "cpu", torch.float32))
    return model


@pytest.mark.parametrize("length", [5, 70])
def test_same_tokens_as_the_plain_runtime(mixed, length):
    prompts = torch.randint(0, 384, (3, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = Runner(mixed, 3, length + 40).generate(prompts, 40)
    assert torch.equal(FastRunner(stack_of(mixed), 3, length + 40).generate(prompts, 40), want)


def test_prompts_in_groups_change_nothing(mixed, monkeypatch):
    prompts = torch.randint(0, 384, (5, 20), generator=torch.Generator().manual_seed(2))
    want = FastRunner(stack_of(mixed), 5, 60).generate(prompts, 12)
    monkeypatch.setattr(fast_model, "PREFILL_ROWS", 47)  # two prompts at a time
    assert torch.equal(FastRunner(stack_of(mixed), 5, 60).generate(prompts, 12), want)


def test_fp8_stays_close(mixed):
    prompts = torch.randint(0, 384, (2, 30), generator=torch.Generator().manual_seed(3))
    runners = [FastRunner(stack_of(mixed), 2, 40, fp8) for fp8 in (False, True)]
    found = []
    for runner in runners:
        runner.prefill(prompts)
        seen = []
        runner._next = lambda stream, seen=seen: seen.append(stream) or torch.zeros(2, dtype=torch.long)  # type: ignore[method-assign]
        with torch.inference_mode():
            runner.decode_once()
        found.append(seen[0][0] + seen[0][1])
    assert runners[1].kv_bytes * 4 == runners[0].kv_bytes
    difference = (found[1] - found[0]).norm() / found[0].norm()
    assert 1e-4 < difference < 0.2


def test_serve_reports_what_it_holds(mixed):
    shapes = Shapes(spec=mixed.spec, num_layers=2, vocab_size=384, tied=True, max_length=256)
    stack = random_stack(
        shapes, [{"attention": "kv1", "ffn": "0.5"}, {"attention": "none", "ffn": "parent"}], "cpu", torch.float32
    )
    weights = stack.num_bytes
    found = serve(stack, 2, Workload(input_len=10, output_len=6), repeats=1)
    spec = mixed.spec
    assert (
        found.memory_bytes == weights + 4 * 2 * 2 * 64 * spec.head_dim
    )  # one layer, one KV head, a page of 64 a sequence
    assert found.tokens_per_second == pytest.approx(12 / (found.ttft_seconds + 5 * found.tpot_seconds))
    assert stack.modules == []
