"""Steps on what the child writes itself: what is sampled against a plain twin, what counts, and a run that stops and goes on."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from puzzle.base.errors import UserError
from puzzle.base.ranks import start_ranks
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.plain.part import Part
from puzzle.data.mixture import IGNORE
from puzzle.heal import memory
from puzzle.heal.log import read_log
from puzzle.heal.memory import HealPlan, plan_memory
from puzzle.heal.on_policy import continued, is_on_policy, on_policy_batch, on_policy_steps, prompt_length
from puzzle.heal.prepare import build_trainer, open_models
from puzzle.heal.settings import HealOptions
from puzzle.runtime.model import load_model
from tiny_parents import write_tiny_parent

HALF = ("--on-policy", 0.5, "--cosine-weight", 0.5, "--reverse-kl", 0.5)


def test_steps_are_spread_evenly_and_prompts_lie_in_the_middle():
    for fraction in (0.0, 0.1, 0.25, 1 / 3, 0.7, 1.0):
        own = [is_on_policy(step, fraction) for step in range(300)]
        assert sum(own) == on_policy_steps(300, fraction) == round(300 * fraction)
        assert all(abs(sum(own[at : at + 30]) - 30 * fraction) <= 1 for at in range(270))
    drawn = [prompt_length(64, 0, step) for step in range(500)]
    assert (min(drawn), max(drawn)) == (16, 48)
    assert {prompt_length(2, 0, step) for step in range(9)} == {1}


def test_what_is_sampled_is_what_a_plain_twin_samples(child):
    """Without a cache; a row's words do not depend on what stands beside it, nor on the number of parts."""
    model, generator = load_model(child), torch.Generator().manual_seed(1)
    batch = torch.randint(384, (2, 4, 24), generator=generator)
    (ids, labels), told = on_policy_batch(model, batch, 0, 3, 7, 380, 1)
    prompt = told["prompt"]
    assert torch.equal(ids[:, :prompt], batch[0, :, :prompt])
    assert not torch.equal(ids, batch[0])
    assert (ids < 380).all()
    assert (labels[:, : prompt - 1] == IGNORE).all()
    assert (labels[:, -1] == IGNORE).all()
    assert torch.equal(labels[:, prompt - 1 : -1], ids[:, prompt:])
    for parts in (2, 4):
        assert torch.equal(on_policy_batch(model, batch, 0, 3, 7, 380, parts)[0][0], ids)
    assert torch.equal(on_policy_batch(model, batch[:, 2:], 2, 3, 7, 380, 1)[0][0], ids[2:])
    assert not torch.equal(on_policy_batch(model, batch, 0, 4, 7, 380, 1)[0][0], ids)
    twin(model, batch[0])


@pytest.mark.parametrize(
    "name", ["nemotron_h with latent experts", "gemma3", "gpt_oss", "granitemoehybrid, Mamba-2 and dense FFNs"]
)
def test_other_layers_go_on_too(tmp_path, name):
    twin(load_model(write_tiny_parent(name, tmp_path / "model")), torch.randint(300, (4, 24)))


def twin(model, ids):
    """Token by token over the whole text, from the same random numbers."""
    found = continued(model, ids, 9, [11, 12, 13, 14], 380, 1)
    for row, seed in enumerate((11, 12, 13, 14)):
        draw, text = torch.Generator().manual_seed(seed), ids[row, :9].tolist()
        while len(text) < 24:
            logits = model(torch.tensor([text]))[0, -1, :380]
            text.append(int((logits - torch.empty(380).exponential_(generator=draw).log()).argmax()))
        assert found[row].tolist() == text


def test_a_gradient_comes_from_what_was_sampled_alone(parent, child, tmp_path):
    options = HealOptions(
        child=str(child), teacher=str(parent), out=tmp_path, tokens=96, seq_len=24, batch_size=4, cosine_weight=0.0, on_policy=1.0,
        reverse_kl=0.3, clip_norm=1e9,
    )  # fmt: skip
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    trainer = build_trainer(options, stages, open_models(options, stages, ranks), ranks)
    trainer.begin_stage(24)
    plain, teacher = load_model(child), load_model(parent)
    batch = torch.randint(384, (2, 4, 24), generator=torch.Generator().manual_seed(1))
    own, told = on_policy_batch(trainer.learner.child, batch, 0, 0, 0, 384, 1)
    for parameter in plain.blocks.parameters():
        parameter.requires_grad_(True)
    plain.norm.weight.requires_grad_(True)
    p, q = (F.log_softmax(model(own[0]), -1)[:, told["prompt"] - 1 : -1] for model in (teacher, plain))
    wanted = (0.7 * (p.exp() * (p - q)) + 0.3 * (q.exp() * (q - p))).sum(-1).mean()
    wanted.backward()
    norm = torch.stack([x.grad.norm() for x in plain.parameters() if x.grad is not None]).norm()
    found = trainer.step(own, 0)
    assert found[0].item() == pytest.approx(wanted.item(), rel=1e-4)
    assert found[5].item() == pytest.approx(norm.item(), rel=1e-4)


def numbers(out):
    """Of the log, but for times."""
    timed = ("tokens_per_second", "sampling_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_log(out / "heal.jsonl")]


@pytest.fixture(scope="module")
def healed(puzzle, parent, child, small, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "out"
    done = puzzle("heal", child, "--teacher", parent, *HALF, *small, "--accumulate", 2, "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "10 steps on its own text" in done.stderr
    return out


def test_it_heals_and_says_how_long_it_sampled(healed):
    record = json.loads((healed / "heal.json").read_text())
    assert record["after"]["kl"] < 0.9 * record["before"]["kl"]
    assert record["run"]["on_policy"] == 0.5
    own = [line for line in read_log(healed / "heal.jsonl") if "prompt" in line]
    assert [line["step"] for line in own] == list(range(2, 21, 2))
    assert all(8 <= line["prompt"] <= 24 and line["sampling_seconds"] > 0 for line in own)
    told = record["on_policy"]
    assert told["num_steps"] == 10
    assert 0 < told["sampling_seconds"] < record["seconds"]


def test_killed_it_goes_on_with_the_same_samples(
    launch, ended, held, kill_at_step, healed, child, parent, small, tmp_path
):
    """Kill -9 in the middle: the same lines and the same weights."""
    out, work = tmp_path / "out", tmp_path / "out.heal"
    command = ("heal", child, "--teacher", parent, *HALF, *small, "--accumulate", 2, "--out", out, "--save-every", 3)
    kill_at_step(work, 8, launch(command, setup=held("puzzle.heal.run.write_healed")))
    assert not out.exists()
    (process,) = launch(command)
    assert ended([process]) == [0], process.log.read_text()
    assert numbers(out) == numbers(healed)
    assert (out / "model.safetensors").read_bytes() == (healed / "model.safetensors").read_bytes()


def test_every_process_samples_its_own_rows(launch, ended, healed, child, parent, small, tmp_path):
    command = ("heal", child, "--teacher", parent, *HALF, *small, "--accumulate", 2, "--out", tmp_path / "out")
    group = launch(command, processes=2)
    assert ended(group) == [0, 0], [process.log.read_text() for process in group]
    for mine, theirs in zip(numbers(tmp_path / "out"), numbers(healed), strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3), mine["step"]


def test_the_dry_run_counts_it(puzzle, child, parent, small, tmp_path):
    command = ("heal", child, "--teacher", parent, *small, "--out", tmp_path / "out", "--dry-run", "--json")
    plain, own = (json.loads(puzzle(*command, *more).stdout)["predicted"] for more in ((), HALF))
    assert "of them sampling" in puzzle(*command[:-1], *HALF).stdout
    assert plain["sampling_seconds"] == 0 < own["sampling_seconds"] < own["seconds"]
    assert not list(tmp_path.iterdir())


def test_what_does_not_go_together_is_refused(
    puzzle, one_line_error, child, parent, corpus, small, tmp_path, monkeypatch
):
    run = ("heal", child, "--teacher", parent, *small, "--out", tmp_path / "out", "--on-policy", 0.5)
    for options, words in (
        (("--on-policy", 1.5), ("--on-policy 1.5: the share of steps",)),
        (("--on-policy", 0.001), ("--on-policy 0.001 of", "steps is none", "or more --tokens")),
        (("--lm-weight", 1), ("--on-policy with --lm-weight", "pass --lm-weight 0")),
        (("--teacher-logits", tmp_path / "said", "--cosine-weight", 0), ("--on-policy asks the teacher while",)),
    ):
        one_line_error(puzzle(*run, *options), *words)
    text = ("heal", child, *small, "--on-policy", 1, "--kl-weight", 0, "--cosine-weight", 0, "--lm-weight", 1)
    one_line_error(puzzle(*text, "--out", tmp_path / "out"), "--on-policy is not used with --kl-weight 0")
    with pytest.raises(UserError, match="`align_tokens` compares with a teacher: set `kl_weight`"):
        HealOptions(child="", out=tmp_path, align_tokens=True, kl_weight=0, cosine_weight=0, lm_weight=1).check()
    (tmp_path / "chats.jsonl").write_text("{}\n")
    blend = tmp_path / "blend.yaml"
    blend.write_text("sources: [{path: chats.jsonl, messages: messages, loss: assistant}]")
    given = [x for x in run if x not in ("--data", corpus)]
    for dry in ((), ("--dry-run",)):
        done = puzzle(*given, "--data-blend", blend, *dry)
        one_line_error(done, "of source 'chats.jsonl' the assistant's tokens alone", "loss: all")
    with monkeypatch.context() as patched:  # a kind whose author wrote no decode step
        patched.setattr(Attention, "new_state", Part.new_state)
        one_line_error(puzzle(*run), "sub-blocks of kind 'gqa' have no plain decode with state")
    assert Gqa.kind == "gqa"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.heal").exists()


@pytest.mark.parametrize("name", ["on_policy", "align_tokens"])
def test_a_teacher_or_a_child_that_is_not_whole_is_refused(child, parent, tmp_path, monkeypatch, name):
    given = {name: 0.5 if name == "on_policy" else True}
    options = HealOptions(child=str(child), teacher=str(parent), out=tmp_path, seq_len=16, cosine_weight=0.0, **given)
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    models = open_models(options, stages, ranks)
    for facts, words in (
        ({"tokens": 99, "sharded": False}, "read layer by layer"),
        ({"tokens": None, "sharded": True}, "`parallel` replicas"),
    ):
        monkeypatch.setattr(memory, "_planned", lambda *_, facts=facts: HealPlan(**facts, device_bytes=1, host_bytes=1))
        if name == "align_tokens" and facts["sharded"]:
            assert plan_memory(options, stages, models, ranks).sharded
            continue
        with pytest.raises(UserError, match=rf"`{name}`.*{words}"):
            plan_memory(options, stages, models, ranks)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [HALF, ("--align-tokens", "--cosine-weight", 0)], ids=["own text", "aligned"])
def test_on_a_gpu(puzzle, parent, child, small, tmp_path, options):
    """Beside CUDA graphs, in bf16; sampled by our kernels."""
    done = puzzle("heal", child, "--teacher", parent, *options, *small, "--device", "cuda", "--out", tmp_path / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads((tmp_path / "out/heal.json").read_text())
    name = "kl" if "kl" in record["after"] else "kl_aligned"
    assert record["after"][name] < 0.9 * record["before"][name]
