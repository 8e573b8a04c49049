"""Both runtimes by their one interface: what holds of the one holds of the other, and they give the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.base.workload import PAGE
from puzzle.blocklib.gqa import Gqa
from puzzle.parents.opened import open_model
from puzzle.parents.rope import Rope
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.interface import Runtime
from puzzle.runtime.model import CausalModel, load_model, random_model
from puzzle.runtime.open import open_runtime
from puzzle.runtime.plain import PlainRuntime
from tiny_parents import PARENTS, write_tiny_parent

RUNTIMES = (PlainRuntime, FastRuntime)


@pytest.fixture(params=RUNTIMES, ids=lambda cls: cls.__name__)
def kind(request) -> type[Runtime]:
    return request.param


def prompts_of(model: CausalModel, batch: int, length: int) -> torch.Tensor:
    vocab = model.structure.vocab_size
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(batch * length))


@pytest.mark.parametrize("name", PARENTS)
def test_both_generate_the_same_of_every_family(name, tmp_path):
    """Prompts of one page and of two; longrope's, which may not cross its switch, all on one side of it."""
    opened = open_model(write_tiny_parent(name, tmp_path))
    model = load_model(opened)
    switches = [rope.switches_at for rope in opened.structure.ropes.values() if rope.switches_at is not None]
    for length, count in ((7, 25), (80, 25)):
        assert not any(length <= at < length + count for at in switches)
        prompts = prompts_of(model, 3, length)
        plain, fast = (cls(model, 3, length + count).generate(prompts, count) for cls in RUNTIMES)
        for row in range(3):
            assert_same_but_for_ties(model, prompts[row], fast[row], plain[row])


def assert_same_but_for_ties(model, prompt, one, other) -> None:
    """Tokens [count]: where they part, both are as likely but for rounding, which differs from processor to processor."""
    parted = (one != other).nonzero().flatten().tolist()
    if parted:
        logits = model(torch.cat((prompt, one[: parted[0]]))[None])[0, -1]
        assert (logits[one[parted[0]]] - logits[other[parted[0]]]).abs() <= 1e-4 * logits.std()


def test_a_prefill_gives_the_token_in_hand(kind, mixed):
    prompts = prompts_of(mixed, 2, 30)
    runtime = kind(mixed, 2, 40)
    first = runtime.prefill(prompts)
    assert first.shape == runtime.ids.shape == (2,)
    assert torch.equal(first, mixed(prompts)[:, -1].argmax(-1))
    assert torch.equal(runtime.ids, first)
    runtime.step()
    assert torch.equal(runtime.ids, mixed(torch.cat((prompts, first[:, None]), dim=1))[:, -1].argmax(-1))
    kept = first.clone()
    runtime.step()
    assert torch.equal(first, kept), "what a prefill gave is the caller's own"


def test_a_runtime_serves_one_batch_after_another(kind, mixed):
    """Longer or shorter ones: what the batch before left in the states does not show."""
    runtime = kind(mixed, 2, 90)
    for length in (60, 9, 33):
        prompts = prompts_of(mixed, 2, length)
        assert torch.equal(runtime.generate(prompts, 20), kind(mixed, 2, 90).generate(prompts, 20))


def test_a_step_can_be_taken_again(kind, mixed):
    """`at` and `ids` say where a runtime stands: the same step gives the same token."""
    runtime = kind(mixed, 2, 40)
    runtime.prefill(prompts_of(mixed, 2, 20))
    before = runtime.ids.clone()
    runtime.step()
    after = runtime.ids.clone()
    runtime.at(20)
    runtime.ids.copy_(before)
    runtime.replayed(runtime.step)()
    assert torch.equal(runtime.ids, after)


def test_what_it_holds(kind, mixed):
    runtime = kind(mixed, 3, 100)
    assert runtime.weight_bytes == mixed.weight_bytes == 4 * mixed.structure.num_parameters
    assert runtime.vocab_size == mixed.structure.vocab_size
    assert runtime.device == torch.device("cpu")
    states = [sub_block.state() for _, _, sub_block in mixed.structure]
    if kind is PlainRuntime:
        assert runtime.state_bytes == 3 * sum(state.num_bytes(100, "float32") for state in states)
    else:  # whole pages; a window may begin in one page and end in the next
        tokens = [PAGE * (2 if state.reach is None else min(2, -(-state.reach // PAGE) + 1)) for state in states]
        kept = sum(state.per_token * n for state, n in zip(states, tokens, strict=True))
        assert runtime.state_bytes == 4 * 3 * kept


def test_noise_stands_in_for_a_prompt(kind, mixed):
    """A step over noise gives some token, and another one over other noise."""
    runtime, tokens = kind(mixed, 8, 40), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        runtime.randomize()
        runtime.at(39)
        runtime.ids.fill_(5)
        runtime.step()
        assert runtime.ids.min() >= 0
        assert runtime.ids.max() < runtime.vocab_size
        tokens.append(runtime.ids.clone())
    assert not torch.equal(*tokens)


def test_frequencies_that_would_change_under_a_cache(kind, mixed):
    """longrope: all short or all long is served, a request that crosses the length is refused."""
    factors = {"short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [2.0, 2.0, 3.0, 4.0]}
    parameters = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 50, **factors}
    ropes = {"default": Rope(head_dim=8, max_length=256, parameters=parameters)}
    model = random_model(replace(mixed.structure, ropes=ropes), "cpu", torch.float32)
    for total in (50, 60):
        runtime = kind(model, 1, total)
        if total == 50:
            runtime.prefill(prompts_of(model, 1, 20))
        else:
            with pytest.raises(UserError, match="prompts of 20 tokens and 40 new ones cross 50"):
                runtime.prefill(prompts_of(model, 1, 20))
            assert torch.equal(
                runtime.prefill(prompts_of(model, 1, 55)), model(prompts_of(model, 1, 55))[:, -1].argmax(-1)
            )


def test_consumed_models_are_used_up(mixed):
    model = random_model(mixed.structure, "cpu", torch.float32)
    prompts = prompts_of(model, 2, 12)
    want = FastRuntime(model, 2, 20).generate(prompts, 8)
    runtime = FastRuntime(model, 2, 20, consume=True)
    assert len(model.blocks) == 0
    assert torch.equal(runtime.generate(prompts, 8), want)
    assert runtime.weight_bytes == 4 * mixed.structure.num_parameters


def test_a_cpu_runs_float32_in_plain_pytorch(mixed):
    assert isinstance(open_runtime(mixed, 1, 16, "float32"), PlainRuntime)
    for precision in ("bf16", "fp8", "int4"):
        with pytest.raises(UserError, match=f"precision {precision} has no runtime on a CPU: float32 has"):
            open_runtime(mixed, 1, 16, precision)


def test_the_mixed_model_is_mixed(mixed):
    """What the tests above rest on."""
    assert {b.kind for _, _, b in mixed.structure} == {"gqa", "swiglu", "linear", "none"}
    assert {b.window for _, _, b in mixed.structure if isinstance(b, Gqa)} == {None, 24}
