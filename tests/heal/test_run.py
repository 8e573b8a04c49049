"""`puzzle heal` end to end on the tiny child: it gets better, survives kill -9, and two processes equal one."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from puzzle.heal.log import read_log
from puzzle.heal.settings import HealOptions
from puzzle.runtime.model import load_model
from tiny_parents import write_tiny_parent


def losses(path: Path) -> list[tuple]:
    """What must not depend on interruptions: all numbers of the log but the speed."""
    lines = read_log(path / "heal.jsonl")
    return [tuple((k, str(v)) for k, v in line.items() if k != "tokens_per_second") for line in lines]


WRITING = "puzzle.heal.run.write_healed"  # the last thing that a healing does


@pytest.fixture(scope="module")
def healed(puzzle, parent, child, small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("healed") / "out"
    done = puzzle("heal", child, "--teacher", parent, *small, "--out", out)
    assert done.exit_code == 0, (done.output, done.exception)
    return out


def test_healing_brings_the_child_nearer(healed, child):
    """By its own record; the log has every step; what is not trained stays."""
    record = json.loads((healed / "heal.json").read_text())
    assert record["after"]["kl"] < 0.85 * record["before"]["kl"]
    assert record["after"]["cosine"] < record["before"]["cosine"] + 0.1
    assert record["num_tokens"] == 5120
    assert record["num_steps"] == 20
    assert not healed.with_name("out.heal").exists()
    lines = read_log(healed / "heal.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "held_out" in line] == [0, 10, 20]
    assert "## Healed" in (healed / "README.md").read_text()
    old, new = load_model(child), load_model(healed)
    assert torch.equal(new.embedding.weight, old.embedding.weight)
    assert not torch.equal(new.norm.weight, old.norm.weight)


def test_the_log_says_what_evaluate_measures(puzzle, healed, parent, corpus):
    """The same held-out text gives the same numbers in `puzzle evaluate`, up to the last token of each sequence."""
    record = json.loads((healed / "heal.json").read_text())
    done = puzzle(
        "evaluate", parent, healed, "--data", corpus, "--no-speed", "--seq-len", 32, "--sequences", 16, "--json"
    )
    found = json.loads(done.stdout)
    assert found["child"]["loss"] == pytest.approx(record["after"]["loss"], rel=1e-4)
    assert found["parent"]["loss"] == pytest.approx(record["after"]["teacher_loss"], rel=1e-4)
    assert found["child"]["kl"] == pytest.approx(record["after"]["kl"], rel=0.05)


def test_healed_again_is_left_alone(puzzle, one_line_error, healed, parent, child, small):
    stamp = (healed / "model.safetensors").stat().st_mtime_ns
    assert puzzle("heal", child, "--teacher", parent, *small, "--out", healed).exit_code == 0
    assert (healed / "model.safetensors").stat().st_mtime_ns == stamp
    one_line_error(
        puzzle("heal", child, "--teacher", parent, *small, "--seed", 1, "--out", healed), "is not empty", "--force"
    )


def test_kill_nine_and_resume_is_bit_exact(launch, ended, held, kill_at_step, healed, child, parent, small, tmp_path):
    """Killed twice, in the middle of anything: the same lines and the same weights as the run that was left alone."""
    out, work = tmp_path / "out", tmp_path / "out.heal"
    arguments = ("heal", child, "--teacher", parent, *small, "--out", out, "--save-every", 3)
    for least in (2, 8):
        group = launch(arguments, setup=held(WRITING))
        kill_at_step(work, least, group)
        assert ended(group) == [-signal.SIGKILL]
        assert not out.exists()
    assert ended(launch(arguments)) == [0]
    assert losses(out) == losses(healed)
    assert (out / "model.safetensors").read_bytes() == (healed / "model.safetensors").read_bytes()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("parallel", ["replicas", "shards"])
def test_two_processes_equal_one(launch, ended, healed, child, parent, small, tmp_path, parallel):
    """Replicas that sum their gradients and FSDP2 shards, over gloo, with micro-batches and recomputed activations: the same
    curve, to 1e-4."""
    out = tmp_path / "out"
    extra = ("--accumulate", 2, "--recompute", "--save-every", 7, "--parallel", parallel)
    group = launch(("heal", child, "--teacher", parent, *small, "--out", out, *extra), processes=2)
    assert ended(group) == [0, 0]
    one, two = (read_log(path / "heal.jsonl") for path in (healed, out))
    assert len(one) == len(two)
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "kl", "cosine", "grad_norm"):
            if name in mine:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-4), (mine["step"], name)
        for name, value in mine.get("held_out", {}).items():
            assert theirs["held_out"][name] == pytest.approx(value, rel=1e-4)
    weights = [dict(load_model(path).named_weights()) for path in (healed, out)]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("parallel", ["replicas", "shards"])
def test_one_process_continues_what_two_began(
    launch, held, kill_at_step, puzzle, healed, child, parent, small, tmp_path, parallel
):
    """What two killed processes left, in shards or not, is put together, and the curve goes on."""
    out, work = tmp_path / "out", tmp_path / "out.heal"
    arguments = ("heal", child, "--teacher", parent, *small, "--out", out, "--save-every", 4)
    group = launch((*arguments, "--parallel", parallel), processes=2, setup=held(WRITING))
    kill_at_step(work, 5, group)
    assert [path.name for path in work.glob("step-*")] != []
    done = puzzle(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    one, two = (read_log(path / "heal.jsonl") for path in (healed, out))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for mine, theirs in zip(one, two, strict=True):
        if "loss" in mine:
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("parallel", ["replicas", "shards"])
def test_kill_nine_of_one_of_two_ends_both_and_is_continued(launch, ended, child, parent, small, tmp_path, parallel):
    """In the middle of a step: one line, and the same command ends in the same bits as two processes that were left alone."""
    arguments = ("heal", child, "--teacher", parent, *small, "--save-every", 3, "--parallel", parallel, "--out")
    kill = """
import os, signal
from puzzle.heal.loss import Learner
plain, calls = Learner.forward, []
def patched(self, *given):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, *given)
Learner.forward = patched
"""
    whole, out = tmp_path / "whole", tmp_path / "out"
    group = launch((*arguments, out), processes=2, setup=kill)
    assert ended(group) == [2, -signal.SIGKILL]
    told = group[0].log.read_text()
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "another process of this run has ended" in line
    assert "Traceback" not in told
    assert list((tmp_path / "out.heal").glob("step-*"))
    for place in (out, whole):
        group = launch((*arguments, place), processes=2)
        assert ended(group) == [0, 0]
    assert ("replica" in group[0].log.read_text()) == (parallel == "replicas")
    assert losses(out) == losses(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_weight_decay_is_of_matrices_alone(tmp_path):
    """Not of the biases of experts, which are stacked."""
    from puzzle.base.ranks import start_ranks
    from puzzle.heal.prepare import build_trainer, open_models

    source = str(write_tiny_parent("gpt_oss", tmp_path / "model"))
    options = HealOptions(
        child=source, teacher=source, out=tmp_path, tokens=64, seq_len=16, batch_size=4, weight_decay=0.1
    )
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    trainer = build_trainer(options, stages, open_models(options, stages, ranks), ranks)
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    found = {name for name, part in zip(trainer.names, trainer.parts, strict=True) if id(part) in decayed}
    matrices = ("_proj", "_proj.weight", "gate.weight")
    assert found == {name for name in trainer.names if name.endswith(matrices)}
    assert any(name.endswith("experts.down_proj_bias") for name in trainer.names)


def test_a_step_that_is_not_finite_is_left_out(child, parent, tmp_path):
    """And the optimiser's moments stay as they were; several in a row end the run."""
    from puzzle.base.ranks import start_ranks
    from puzzle.heal.prepare import build_trainer, open_models

    options = HealOptions(child=str(child), teacher=str(parent), out=tmp_path, tokens=64, seq_len=16, batch_size=4)
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    trainer = build_trainer(options, stages, open_models(options, stages, ranks), ranks)
    trainer.begin_stage(16)
    batch = torch.randint(384, (2, 4, 16), generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(trainer.step(batch, 0)).all()
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    weight = trainer.learner.child.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("inf")
    for count in (1, 2):
        assert trainer.step(batch, 0)[-2:].tolist() == [count, count]
    with torch.no_grad():
        weight.copy_(kept)
    after = trainer.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name != "skipped")
    assert trainer.step(batch, 0)[-2:].tolist() == [2, 0]


def test_divergence_ends_in_one_line(puzzle, one_line_error, child, parent, small, tmp_path, monkeypatch):
    from puzzle.heal import loss

    monkeypatch.setattr(loss, "cosine_distance", lambda child, teacher: (child * float("nan")).sum(-1))
    done = puzzle("heal", child, "--teacher", parent, *small, "--out", tmp_path / "out")
    one_line_error(done, "5 steps in a row up to step 5", "lower --lr 0.01")


def test_a_run_that_ends_without_a_finite_loss_is_no_child(puzzle, one_line_error, child, parent, small, tmp_path):
    """Too few steps to be stopped by skipped ones: the last evaluation says it, and nothing is written."""
    short = (*small, "--tokens", 512, "--lr", 1e30)
    done = puzzle("heal", child, "--teacher", parent, *short, "--out", tmp_path / "out")
    one_line_error(done, "held-out loss is nan after step 2", "lower --lr 1e+30")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_in_one_line_and_keeps_the_last_checkpoint(
    puzzle, one_line_error, child, parent, small, tmp_path, monkeypatch
):
    save, calls = dcp.save, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            cause = OSError(errno.ENOSPC, "No space left on device")
            raise CheckpointException("save", {0: (cause, None)})
        return save(*arguments, **options)

    monkeypatch.setattr(dcp, "save", full)
    arguments = ("heal", child, "--teacher", parent, *small, "--save-every", 6, "--out", tmp_path / "out")
    one_line_error(puzzle(*arguments), "disk full while writing", "run the same command again")
    assert [path.name for path in (tmp_path / "out.heal").glob("step-*")] == ["step-00000006"]
    assert puzzle(*arguments).exit_code == 0


def test_without_a_teacher_it_learns_from_the_text(puzzle, child, small, tmp_path):
    plain = ("--kl-weight", 0, "--cosine-weight", 0, "--lm-weight", 1, "--train-embeddings", "--json")
    done = puzzle("heal", child, *small, *plain, "--out", tmp_path / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads(done.stdout)
    assert record["after"]["loss"] < record["before"]["loss"] - 0.3
    assert "kl" not in record["after"]
    old, new = load_model(child), load_model(tmp_path / "out")
    assert not torch.equal(old.embedding.weight, new.embedding.weight)


def test_a_teacher_of_another_size(puzzle, one_line_error, make_parent, child, corpus, small, tmp_path):
    """Same tokenizer, other hidden size and vocabulary padding: KL works, hidden states cannot be compared."""
    teacher = make_parent(
        tmp_path / "teacher", corpus, hidden_size=48, num_hidden_layers=2, vocab_size=400, tie_word_embeddings=False
    )
    arguments = ("heal", child, "--teacher", teacher, *small, "--out", tmp_path / "out")
    one_line_error(puzzle(*arguments), "hidden size 48", "--cosine-weight 0")
    done = puzzle(*arguments, "--cosine-weight", 0, "--temperature", 2, "--lm-weight", 0.1, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads(done.stdout)
    assert record["after"]["kl"] < record["before"]["kl"]


def test_layers_match_by_their_origins(puzzle, one_line_error, make_child, parent, small, tmp_path):
    """A child of three layers says in layer_origins which parent layers they stand for."""
    from puzzle.heal.prepare import matching_layers
    from puzzle.parents.opened import open_model

    child = make_child(parent, tmp_path / "child", drop=1)
    assert matching_layers(open_model(child), open_model(parent)) == [(0, 0), (1, 2), (2, 3)]
    stages = ("--stages", "16:1k,64:1k")
    given = (*small[:2], *small[6:])  # without the length and tokens that the stages say
    done = puzzle("heal", child, "--teacher", parent, *given, *stages, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)["run"]["stages"]
    assert [(s["seq_len"], s["batch_size"], s["num_steps"]) for s in found] == [(16, 8, 8), (64, 2, 8)]
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_origins"] == [0, 2, 3]
    config = json.loads((child / "config.json").read_text())
    for origins, text in (([0, 2], "must rise"), ([0, 2, 4], "must rise"), (None, "no layer_origins")):
        config["layer_origins"] = origins
        (child / "config.json").write_text(json.dumps(config))
        one_line_error(puzzle("heal", child, "--teacher", parent, *small, "--out", tmp_path / "new"), text)


def test_dry_run_writes_nothing(puzzle, child, parent, tmp_path):
    done = puzzle(
        "heal", child, "--teacher", parent, "--stages", "32:2k,64:1k", "--batch-size", 4, "--out", tmp_path / "out",
        "--dry-run", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout)
    assert found["predicted"]["num_steps"] == 16 + 8
    assert found["predicted"]["seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_help_shows_examples(puzzle):
    done = puzzle("heal", "--help")
    assert done.exit_code == 0
    for text in ("puzzle heal child --teacher", "torchrun", "sources:", "--json"):
        assert text in done.output


def test_a_teacher_is_needed_and_must_fit(puzzle, one_line_error, child, parent, small, tmp_path, corpus, make_parent):
    one_line_error(puzzle("heal", child, *small, "--out", tmp_path / "out"), "no --teacher", "--lm-weight 1")
    one_line_error(puzzle("heal", child, "--teacher", parent, "--seq-len", 32, "--out", tmp_path / "out"), "no data")
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.py").write_text("x = 1\n" * 2000)
    other = make_parent(tmp_path / "other", few)
    one_line_error(
        puzzle("heal", child, "--teacher", other, *small, "--out", tmp_path / "out"), "has another tokenizer"
    )


def test_an_unfinished_run_with_other_options_is_kept(
    puzzle, one_line_error, child, parent, small, tmp_path, monkeypatch
):
    from puzzle.heal import run

    def stop(*arguments):
        raise KeyboardInterrupt

    arguments = ("heal", child, "--teacher", parent, *small, "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(run.Run, "record", stop)
        puzzle(*arguments)
    one_line_error(puzzle(*arguments, "--lr", 0.02), "unfinished run with another lr", "--force")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "out").mkdir()
    again = (*arguments[:-1], tmp_path / "link")
    one_line_error(puzzle(*again, "--lr", 0.02), "out.heal holds an unfinished run with another lr")
    assert puzzle(*again).exit_code == 0
    assert not (tmp_path / "out.heal").exists()


@pytest.mark.gpu
def test_a_cuda_graph_gives_what_eager_steps_give(puzzle, child, parent, small, tmp_path):
    """In bf16, within its noise; and the graph was indeed captured."""
    found = []
    for option in ("--cuda-graph", "--no-cuda-graph"):
        out = tmp_path / option
        done = puzzle("heal", child, "--teacher", parent, *small, "--device", "cuda", option, "--out", out)
        assert done.exit_code == 0, (done.output, done.exception)
        assert "no CUDA graph here" not in done.stderr
        found.append([line["loss"] for line in read_log(out / "heal.jsonl") if "loss" in line])
    assert found[0] == pytest.approx(found[1], rel=0.03)


def test_a_disk_that_is_too_small_is_said_before_anything_is_trained(
    puzzle, one_line_error, child, parent, small, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    done = puzzle("heal", child, "--teacher", parent, *small, "--out", tmp_path / "out")
    one_line_error(done, "and the healed child need ", "97.7 KiB are free: free some space")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.heal" / "heal.jsonl").exists()
