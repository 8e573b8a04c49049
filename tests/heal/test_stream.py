"""A teacher that is streamed teaches what one teaches that is whole, to the bit, however many steps it looks ahead."""

from __future__ import annotations

import json
import re

import pytest
import torch

from puzzle.base import device
from puzzle.base.ranks import Ranks, start_ranks
from puzzle.heal import run
from puzzle.heal.log import read_log
from puzzle.heal.memory import heal_bytes, plan_memory
from puzzle.heal.prepare import open_models
from puzzle.heal.settings import HealOptions
from puzzle.runtime import residency

SIZES = {"tokens": 1024, "seq_len": 32, "batch_size": 4, "validation_sequences": 6, "accumulate": 2}
EACH = (12 + 3) * 64 * 4  # bytes of what waits of a token


def numbers(out):
    lines = read_log(out / "heal.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture
def asked(deep, make_child, corpus, tmp_path, monkeypatch):
    """(the command, `limit(tokens)`: within which so many tokens of the streamed teacher can wait)."""
    monkeypatch.setattr(device, "held_memory", lambda on: 0)
    monkeypatch.setattr(residency, "held_memory", lambda on: 0)
    child = make_child(deep, tmp_path / "child")
    sizes = [x for name, value in SIZES.items() for x in ("--" + name.replace("_", "-"), value)]
    command = ("heal", child, "--teacher", deep, "--data", corpus, *sizes, "--eval-every", 4, "--device", "cpu")
    options = HealOptions(child=str(child), teacher=str(deep), out=tmp_path / "x", **SIZES)
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    least = heal_bytes(options, stages, open_models(options, stages, ranks), ranks, streamed=True, sharded=False)
    return command, lambda tokens: int((least + tokens * EACH + 10) / device.PLANNED) + 1


def test_streamed_and_interrupted(puzzle, asked, tmp_path, monkeypatch):
    command, limit = asked
    assert puzzle(*command, "--out", tmp_path / "whole").exit_code == 0
    wanted = numbers(tmp_path / "whole")
    for tokens, steps in ((64, 1), (300, 2), (600, 4)):
        out = tmp_path / str(tokens)
        arguments = (*command, "--out", out, "--save-every", 3, "--memory-limit", limit(tokens))
        after = run.Run._after

        def stop(self, done, bar, after=after):
            after(self, done, bar)
            if done == 5:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(run.Run, "_after", stop)
            assert puzzle(*arguments).exit_code != 0
        done = puzzle(*arguments)
        assert done.exit_code == 0, (done.output, done.exception)
        assert f"the teacher layer by layer, once in {steps} steps" in done.stderr
        assert "continuing" in done.stderr
        assert numbers(out) == wanted
        weights = [(path / "model.safetensors").read_bytes() for path in (out, tmp_path / "whole")]
        assert weights[0] == weights[1]


def test_too_little_for_what_it_shows(puzzle, one_line_error, asked, tmp_path):
    command, limit = asked
    done = puzzle(*command, "--out", tmp_path / "out", "--memory-limit", limit(10))
    one_line_error(done, "a teacher that is read layer by layer needs", "of 64 tokens", "a larger --accumulate")
    assert not (tmp_path / "out").exists()


def test_dry_run(puzzle, asked, tmp_path):
    command, limit = asked
    done = puzzle(*command, "--out", tmp_path / "out", "--memory-limit", limit(300), "--dry-run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    facts = json.loads(done.stdout)
    assert re.match("layer by layer, once in 2 steps", facts["teacher"])
    assert 0 < facts["predicted"]["peak_memory_bytes"] < limit(300)
    assert facts["predicted"]["seconds"] > 0


def test_plan_for_a_gpu(asked, deep, tmp_path, monkeypatch):
    """What waits is in host memory there, which has a limit of its own."""
    options = HealOptions(child=str(tmp_path / "child"), teacher=str(deep), out=tmp_path / "x", **SIZES)
    stages, ranks = options.plan_stages(), start_ranks("cpu")
    models = open_models(options, stages, ranks)
    used = heal_bytes(options, stages, models, ranks, streamed=True, sharded=False)
    staged = 4 * residency.layer_parameters(models.teacher.structure.layers[0]) * 4
    for host, tokens in ((staged + 500 * 2 * EACH, 500), (10**9, 1024)):
        memory = residency.Memory(device=used + 1000, host=host)
        monkeypatch.setattr(residency.Memory, "of", classmethod(lambda cls, on, limit, ranks, memory=memory: memory))
        plan = plan_memory(options, stages, models, ranks)
        assert plan.tokens == tokens
        assert plan.host_bytes <= host
        assert plan.device_bytes == used


ORDER = [(False, False), (True, False), (False, True), (True, True)]  # (sharded, streamed)


@pytest.mark.parametrize("room", ORDER)
@pytest.mark.parametrize("parallel", ["auto", "replicas", "shards"])
def test_plan_for_several_gpus(asked, deep, tmp_path, monkeypatch, parallel, room):
    """room: what fits just. The first of ORDER that fits is taken, of those that are asked for."""
    options = HealOptions(child=str(tmp_path / "child"), teacher=str(deep), out=tmp_path, parallel=parallel, **SIZES)
    stages, ranks = options.plan_stages(), Ranks(rank=0, world=2, device=torch.device("cpu"))
    models = open_models(options, stages, ranks)
    needed = {(a, b): heal_bytes(options, stages, models, ranks, sharded=a, streamed=b) for a, b in ORDER}
    memory = residency.Memory(device=needed[room], host=10**9)
    monkeypatch.setattr(residency.Memory, "of", classmethod(lambda cls, on, limit, ranks: memory))
    plan = plan_memory(options, stages, models, ranks)
    ways = [way for way in ORDER if parallel == "auto" or way[0] == (parallel == "shards")]
    wanted = next((way for way in ways if needed[way] <= memory.device), ways[-1])
    assert (plan.sharded, plan.tokens is not None) == wanted
    assert plan.device_bytes == needed[wanted]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("parallel", ["replicas", "shards"])
def test_streamed_by_two_processes(launch, ended, asked, deep, tmp_path, parallel):
    """Each streams the teacher for its own sequences: what the child learns is what a whole one teaches."""
    command, _ = asked
    options = HealOptions(child=str(tmp_path / "child"), teacher=str(deep), out=tmp_path, **SIZES)
    stages, ranks = options.plan_stages(), Ranks(rank=0, world=2, device=torch.device("cpu"))
    models = open_models(options, stages, ranks)
    least = heal_bytes(options, stages, models, ranks, streamed=True, sharded=parallel == "shards")
    setup = "from puzzle.base import device; from puzzle.runtime import residency\n"
    setup += "device.held_memory = residency.held_memory = lambda on: 0"
    limit = ("--memory-limit", int((least + 100 * EACH) / device.PLANNED) + 1)
    for name, more in (("whole", ()), ("streamed", limit)):
        group = launch((*command, "--parallel", parallel, "--out", tmp_path / name, *more), processes=2, setup=setup)
        assert ended(group) == [0, 0], [p.log.read_text() for p in group]
        told = group[0].log.read_text()
        assert ("the teacher layer by layer" in told) == (name == "streamed"), told
    for mine, theirs in zip(numbers(tmp_path / "streamed"), numbers(tmp_path / "whole"), strict=True):
        assert mine == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in theirs.items()}
