"""`puzzle heal --old-lr`: what a grown child had before stays to the bit, or learns slowly, and the new learns."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from puzzle.base.ranks import Ranks
from puzzle.heal.log import read_log
from puzzle.heal.memory import MASTER_BYTES, heal_bytes
from puzzle.heal.prepare import open_models
from puzzle.heal.settings import HealOptions
from puzzle.parents.grown import new_tensors

TEXT = ("--kl-weight", 0, "--cosine-weight", 0, "--lm-weight", 1)
FIXED = "e_score_correction_bias"


@pytest.fixture(scope="module")
def grown(puzzle, parent, tmp_path_factory):
    out = tmp_path_factory.mktemp("grown") / "grown"
    assert puzzle("grow", parent, "--experts", 3, "--width", 40, "--layers", "1-3", "--out", out).exit_code == 0
    return out


def moved(grown, out) -> dict[str, float]:
    """By name, how far the mean weight has come."""
    before, after = (load_file(path / "model.safetensors") for path in (grown, out))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    return {name: (after[name] - tensor).abs().mean().item() for name, tensor in before.items()}


def split(grown, found: dict[str, float]) -> tuple[list[float], list[float]]:
    """Of the new ones, and of the old ones."""
    new = new_tensors(grown)
    return [v for n, v in found.items() if n in new and FIXED not in n], [v for n, v in found.items() if n not in new]


@pytest.mark.parametrize("more", [(), ("--dtype", "bf16", "--recompute", "--accumulate", 2)], ids=["fp32", "bf16"])
def test_the_old_stays_to_the_bit(puzzle, grown, small, tmp_path, more):
    """Whatever it is computed in; and grow.json goes along, for the next round."""
    done = puzzle("heal", grown, *small, *TEXT, *more, "--old-lr", 0, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads(done.stdout)
    assert record["after"]["loss"] < record["before"]["loss"] - 0.05
    assert record["run"]["old_lr"] == 0
    assert set(record["expert_load"]) == {"1", "2", "3"}
    assert all(sum(shares) == pytest.approx(1, abs=1e-5) for shares in record["expert_load"].values())
    assert "busiest expert" in done.stderr
    new, old = split(grown, moved(grown, tmp_path / "out"))
    assert min(new) > 0
    assert max(old) == 0
    assert new_tensors(tmp_path / "out") == new_tensors(grown)


def test_the_old_learns_slowly(puzzle, grown, small, tmp_path):
    """By a tenth; embedding and head with it where they are trained."""
    asked = (
        "heal",
        grown,
        *small,
        *TEXT,
        "--tokens",
        256,
        "--warm-up",
        0,
    )  # one step of AdamW, of the learning rate's size
    found = []
    for share, more in ((1, ()), (0.1, ("--train-embeddings",))):
        out = tmp_path / str(share)
        assert puzzle(*asked, "--old-lr", share, *more, "--out", out).exit_code == 0
        found.append(moved(grown, out))
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[1][name] == pytest.approx(0.1 * found[0][name], rel=0.02)
    assert found[0]["model.embed_tokens.weight"] == 0
    assert 0 < found[1]["model.embed_tokens.weight"] < 0.002


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize(("parallel", "share"), [("shards", 0), ("replicas", 0), ("shards", 0.1)])
def test_two_processes_equal_one(puzzle, launch, ended, grown, small, tmp_path, parallel, share):
    """The curve of one process, and what stays stays."""
    asked = ("heal", grown, *small, *TEXT, "--tokens", 2048, "--old-lr", share, "--out")
    assert puzzle(*asked, tmp_path / "one").exit_code == 0
    group = launch((*asked, tmp_path / "two", "--parallel", parallel), processes=2)
    assert ended(group) == [0, 0]
    one, two = ([x["loss"] for x in read_log(tmp_path / name / "heal.jsonl") if "loss" in x] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-4)
    new, old = split(grown, moved(grown, tmp_path / "two"))
    assert min(new) > 0
    assert (max(old) == 0) == (share == 0)


def test_a_stopped_run_goes_on_bit_by_bit(puzzle, grown, small, tmp_path, monkeypatch):
    from puzzle.heal import run

    asked = ("heal", grown, *small, *TEXT, "--old-lr", 0, "--save-every", 7, "--out")
    assert puzzle(*asked, tmp_path / "whole").exit_code == 0
    step, calls = run.Run._after, []

    def stop(self, done, bar):
        step(self, done, bar)
        calls.append(done)
        if done == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run.Run, "_after", stop)
        assert puzzle(*asked, tmp_path / "out").exit_code != 0
    assert calls[-1] == 9
    done = puzzle(*asked, tmp_path / "out")
    assert "after step 7" in done.stderr
    assert max(moved(tmp_path / "whole", tmp_path / "out").values()) == 0


def test_a_plan_counts_what_learns(puzzle, grown, tmp_path):
    asked = ("heal", grown, *TEXT, "--tokens", "1k", "--seq-len", 32, "--batch-size", 4, "--out", tmp_path / "x")
    all_, new = (json.loads(puzzle(*asked, "--old-lr", share, "--dry-run", "--json").stdout) for share in (1, 0))
    tensors = load_file(grown / "model.safetensors")
    assert new["trained_parameters"] == sum(tensors[n].numel() for n in new_tensors(grown) if FIXED not in n)
    assert new["trained_parameters"] < all_["trained_parameters"]
    frozen = all_["trained_parameters"] - new["trained_parameters"]
    assert all_["predicted"]["disk_bytes"] - new["predicted"]["disk_bytes"] == 2 * 12 * frozen
    alone, needed = Ranks(rank=0, world=1, device=torch.device("cpu")), []
    for share in (1, 0):
        options = HealOptions(
            child=str(grown), out=tmp_path, kl_weight=0, cosine_weight=0, lm_weight=1, old_lr=share, seq_len=32
        )
        stages = options.plan_stages()
        models = open_models(options, stages, alone)
        needed.append(heal_bytes(options, stages, models, alone, streamed=False, sharded=False))
    assert needed[0] - needed[1] == (MASTER_BYTES - 4) * frozen  # float32, without gradient and moments


def test_refusals(puzzle, one_line_error, parent, grown, small, tmp_path):
    asked = (*small, *TEXT, "--out", tmp_path / "x")
    one_line_error(puzzle("heal", parent, *asked, "--old-lr", 0), "--old-lr 0", "has no grow.json", "puzzle grow")
    one_line_error(puzzle("heal", grown, *asked, "--old-lr", 2), "--old-lr 2", "between 0 and 1")
    both = ("--old-lr", 0, "--train-embeddings")
    one_line_error(puzzle("heal", grown, *asked, *both), "--train-embeddings with --old-lr 0")
    other = shutil.copytree(parent, tmp_path / "other")
    shutil.copy(grown / "grow.json", other)
    one_line_error(puzzle("heal", other, *asked, "--old-lr", 0), "grow.json names model.layers.1.mlp.experts.down_proj")
    (other / "grow.json").write_text('{"schema": 1, "new": []}')
    one_line_error(puzzle("heal", other, *asked, "--old-lr", 0), "grow.json is broken")
