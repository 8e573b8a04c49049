"""Building, grouping, widening and resuming libraries."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks
from puzzle.blocklib.distill import Recipe, VariantTrainer
from puzzle.blocklib.linear import Linear
from puzzle.library.build import Builder, BuildOptions, build_library
from puzzle.library.manifest import Library
from puzzle.library.plan import describe
from puzzle.library.snapshot import Snapshots
from puzzle.parents.opened import open_model

SMALL = {
    "tokens": 1024,
    "seq_len": 32,
    "batch_size": 4,
    "calibration_sequences": 8,
    "validation_sequences": 1,
    "lr": 3e-3,
}


def hashes(library: Path) -> dict[str, str]:
    """sha256 of every file that a build leaves, by relative path."""
    return {
        str(p.relative_to(library)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(library.rglob("*"))
        if p.is_file()
    }


def options(corpus: Path, out: Path, **changes) -> BuildOptions:
    return BuildOptions(data=[str(corpus)], out=out, device="cpu", **SMALL | changes)


def test_training_lowers_the_loss(library):
    for path in library.glob("blocks/*/attention/kv1.json"):
        record = json.loads(path.read_text())
        assert record["validation_loss_after"] < record["validation_loss_before"], path
        assert record["status"] == "trained"


@pytest.mark.parametrize("group_size", [1, 3])
def test_groups_do_not_change_a_bit(parent, corpus, tmp_path, group_size):
    """Layers trained one, three or all at a time end in the same bytes."""
    build_library(str(parent), options(corpus, tmp_path / "all"))
    build_library(str(parent), options(corpus, tmp_path / "grouped", group_size=group_size))
    assert hashes(tmp_path / "all") == hashes(tmp_path / "grouped")


def test_blocks_of_another_start_are_made_anew(parent, corpus, tmp_path, monkeypatch):
    """A library of before attention's linear maps began as least squares: these alone are missing."""
    asked = {"attention": "kv1,linear,linear-4", "ffn": "0.5,linear", "layers": "1-2"}
    build_library(str(parent), options(corpus, tmp_path / "now", **asked))
    plain = Linear.stand_in

    def earlier(own, name):
        variant = plain(own, name)
        if variant is None or own.kind != "gqa":
            return variant
        tensors = {n: torch.full(s, 0.1) for n, s in variant.sub_block.tensors().items()}
        return replace(variant, edition=0, initialise=lambda block: tensors)

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "stand_in", earlier)
        build_library(str(parent), options(corpus, tmp_path / "before", **asked))
    old = hashes(tmp_path / "before")
    build_library(str(parent), options(corpus, tmp_path / "before", **asked))
    found = hashes(tmp_path / "before")
    changed = {str(Path(name).with_suffix("")) for name in old if found[name] != old[name]}
    assert changed == {f"blocks/L0{layer}/attention/{name}" for layer in (1, 2) for name in ("linear", "linear-4")}
    assert found == hashes(tmp_path / "now")


@pytest.mark.parametrize("variants", ["linear", "linear-4"])
def test_a_linear_map_begins_better_than_nothing(parent, corpus, tmp_path, variants):
    """In place of attention and of the FFN: 1 is the loss of leaving them out."""
    build_library(
        str(parent),
        options(
            corpus,
            tmp_path / "lib",
            attention=variants,
            ffn=variants,
            tokens=0,
            calibration_sequences=32,
            validation_sequences=8,
        ),
    )
    records = [json.loads(path.read_text()) for path in (tmp_path / "lib").glob("blocks/*/*/linear*.json")]
    assert len(records) == 2 * len(Library.open(tmp_path / "lib").layers)
    assert all(record["validation_loss_before"] < 1 for record in records)


@pytest.mark.parametrize("ffn", ["none", "0.5-obs", "linear-4"])
def test_a_parent_that_overflows_is_named_before_it_trains(parent, corpus, tmp_path, poison, monkeypatch, ffn):
    """Whatever its variants start from, and where LAPACK or a GPU's solver breaks at what is not finite."""
    broken = shutil.copytree(parent, tmp_path / "parent")
    for name in ("gate_proj", "up_proj"):
        poison(broken, f"model.layers.1.mlp.{name}.weight", lambda weight: weight * 1e25)
    monkeypatch.setattr(VariantTrainer, "step", None)
    plain = torch.linalg.eigh

    def strict(matrix):
        if not matrix.isfinite().all():
            raise torch.linalg.LinAlgError("failed to converge")
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", strict)
    with pytest.raises(UserError, match=r"layer 1 ffn of .*parent: .* not finite on this text, in float32"):
        build_library(str(broken), options(corpus, tmp_path / "lib", attention="kv1", ffn=ffn))


@pytest.mark.parametrize(("sequences", "told"), [(11, True), (12, False)])  # 352 and 384 tokens for 96 channels
def test_few_tokens_for_a_second_order_start_are_said(parent, corpus, tmp_path, capfd, sequences, told):
    asked = {"attention": "kv1", "ffn": "0.5-obs", "layers": "1", "tokens": 0, "calibration_sequences": sequences}
    build_library(str(parent), options(corpus, tmp_path / "lib", **asked))
    assert ("352 calibration tokens for 96 channels: -obs starts worse" in capfd.readouterr().err) == told


def test_layers_can_be_chosen(parent, corpus, tmp_path):
    """Layer 2 alone trains as it does in a build of all layers, though layers 0 and 1 only pass activations on."""
    build_library(str(parent), options(corpus, tmp_path / "all", attention="kv1", ffn="0.5"))
    build_library(str(parent), options(corpus, tmp_path / "one", attention="kv1", ffn="0.5", layers="2"))
    all_hashes, one_hashes = hashes(tmp_path / "all"), hashes(tmp_path / "one")
    blocks = [name for name in one_hashes if name.startswith("blocks")]
    assert len(blocks) == 4
    assert all(one_hashes[name] == all_hashes[name] for name in blocks)
    assert Library.open(tmp_path / "one").layers == [2]


def test_a_library_can_be_widened(parent, corpus, tmp_path):
    """New variants are added to a library; what was trained stays untouched."""
    out = tmp_path / "lib"
    build_library(str(parent), options(corpus, out, attention="kv1", ffn="none"))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("kv1.*")}
    build_library(str(parent), options(corpus, out, attention="none", ffn="0.25"))
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("kv1.*")}
    facts = json.loads((out / "library.json").read_text())
    assert list(facts["layers"]) == ["0", "1", "2", "3"]
    for layer in facts["layers"].values():
        assert {slot: list(names) for slot, names in layer.items()} == {
            "attention": ["kv1", "none"],
            "ffn": ["none", "0.25"],
        }
    for space in Library.open(out).spaces:
        assert list(space["attention"]) == ["parent", "kv1", "none"]
        assert list(space["ffn"]) == ["parent", "none", "0.25"]


def test_what_a_stopped_build_has_not_made_is_not_offered(puzzle, parent, corpus, tmp_path, monkeypatch):
    """To the next one, which asks for other variants and is whole; asked for again it is made."""
    out = tmp_path / "lib"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("puzzle.library.build.Builder._run_group", stop)
        with pytest.raises(KeyboardInterrupt):
            build_library(str(parent), options(corpus, out, attention="kv1", ffn="none"))
    assert [*Library.open(out).spaces[0]["attention"]] == ["parent", "kv1"]
    build_library(str(parent), options(corpus, out, attention="none", ffn="none"))
    for space in Library.open(out).spaces:
        assert {slot: list(names) for slot, names in space.items()} == {
            "attention": ["parent", "none"],
            "ffn": ["parent", "none"],
        }
    done = puzzle("score", out, "--data", corpus, "--parent", parent, "--sequences", 2, "--seq-len", 32)
    assert done.exit_code == 0, (done.output, done.exception)
    build_library(str(parent), options(corpus, out, attention="kv1", ffn="none"))
    assert [*Library.open(out).spaces[0]["attention"]] == ["parent", "none", "kv1"]


def test_damaged_blocks_are_trained_again(parent, corpus, tmp_path):
    out = tmp_path / "lib"
    build_library(str(parent), options(corpus, out, attention="kv1", ffn="0.5"))
    whole = hashes(out)
    target = out / "blocks/L01/ffn/0.5.safetensors"
    target.write_bytes(target.read_bytes()[:-7])
    (out / "blocks/L02/attention/kv1.json").write_text("{")
    build_library(str(parent), options(corpus, out, attention="kv1", ffn="0.5"))
    assert hashes(out) == whole


def test_a_run_killed_after_its_last_block_leaves_nothing(parent, corpus, tmp_path):
    """The next one, which has nothing to train, takes its snapshot away."""
    out = tmp_path / "lib"
    build_library(str(parent), options(corpus, out, attention="kv1", ffn="none"))
    whole = hashes(out)
    (out / ".work/step-00000007").mkdir(parents=True)
    (out / ".work/snapshot.json").write_text("{}")
    build_library(str(parent), options(corpus, out, attention="kv1", ffn="none"))
    assert hashes(out) == whole


@pytest.mark.parametrize(
    "content",
    [
        "x",
        "[]",
        '{"schema": 1}',
        '{"schema": 1, "key": "K", "step": 5}',
        '{"schema": 1, "key": "K", "step": null, "layers": 3}',
    ],
)
def test_a_broken_snapshot_counts_as_none(tmp_path, content):
    (tmp_path / "snapshot.json").write_text(content)
    assert Snapshots(tmp_path, "K", 60, Ranks(device=torch.device("cpu"))).load({}) == 0


def test_a_snapshot_continues_bit_for_bit(parent, corpus, tmp_path, monkeypatch):
    """Stop in the middle of a group, with snapshots after every step, and run again."""
    build_library(str(parent), options(corpus, tmp_path / "whole", attention="kv1", ffn="0.5,linear"))
    steps = []
    plain = Recipe.lr_at

    def stop_at_step_5(self, step):
        steps.append(step)
        if step == 5 and len(steps) == 6:
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(Recipe, "lr_at", stop_at_step_5)
    broken = options(corpus, tmp_path / "broken", attention="kv1", ffn="0.5,linear", snapshot_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        build_library(str(parent), broken)
    assert list((tmp_path / "broken/.work").rglob("*.safetensors"))
    build_library(str(parent), broken)
    assert steps == [0, 1, 2, 3, 4, 5, 5, 6, 7], "the second run starts where the snapshot was taken"
    assert hashes(tmp_path / "broken") == hashes(tmp_path / "whole")


def test_kill_9_anywhere_then_resume(launch, parent, corpus, tmp_path):
    """The process is killed three times at random moments; the library ends as an undisturbed one."""

    def started(name: str):
        script = (
            "from pathlib import Path; from puzzle.library.build import *\n"
            f"build_library({str(parent)!r}, BuildOptions(data=[{str(corpus)!r}], out=Path({str(tmp_path / name)!r}), device='cpu',"
            f" snapshot_seconds=0.1, **{SMALL | {'tokens': 8192}!r}))\nraise SystemExit(0)"
        )
        return launch((), setup=script)[0]

    process, begin = started("whole"), time.monotonic()
    process.join()
    assert process.exitcode == 0, process.log.read_text()
    whole_seconds = time.monotonic() - begin
    draw = random.Random(7)
    for _ in range(3):
        process = started("killed")
        time.sleep(whole_seconds * draw.uniform(0.3, 0.95))
        process.kill()
        process.join()
    process = started("killed")
    process.join()
    assert process.exitcode == 0, process.log.read_text()
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_dry_run_matches_the_plan(parent, corpus, tmp_path, puzzle):
    done = puzzle(
        "build-library",
        parent,
        "--data",
        corpus,
        "--out",
        tmp_path / "x",
        "--dry-run",
        "--json",
        "--tokens",
        "4096",
        "--seq-len",
        64,
        "--batch-size",
        2,
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["groups"] == [[0, 1, 2, 3]]
    assert facts["predicted"]["num_tokens"] == 4096
    assert facts["predicted"]["seconds"] > 0
    assert not (tmp_path / "x").exists()
    builder = Builder(open_model(parent), options(corpus, tmp_path / "x"))
    plan = builder.plan()
    trained = [
        sub_block.num_parameters
        for space in builder.spaces.values()
        for names in space.values()
        for name, sub_block in names.items()
        if name != "parent"
    ]
    assert facts["num_trained_parameters"] == plan.num_trained_parameters == sum(trained)
    told = describe(plan, 1.0, builder.spaces, facts["device"])
    assert set(told) == set(facts)
    assert told["variants"] == facts["variants"]


NEST = {"attention": "parent", "ffn": "0.75,0.5,0.25", "nested": True}


def test_nested_ffns_share_the_weights_of_the_widest(parent, corpus, tmp_path):
    """Blocks are written as any others; each is the first part of the next; losses fall for all of them."""
    build_library(str(parent), options(corpus, tmp_path / "lib", **NEST))
    for layer in sorted((tmp_path / "lib" / "blocks").iterdir()):
        blocks = [load_file(layer / "ffn" / f"{name}.safetensors") for name in ("0.25", "0.5", "0.75")]
        for narrow, wide in pairwise(blocks):
            width = len(narrow["gate_proj.weight"])
            assert 0 < width < len(wide["gate_proj.weight"])
            assert torch.equal(wide["up_proj.weight"][:width], narrow["up_proj.weight"])
            assert torch.equal(wide["down_proj.weight"][:, :width], narrow["down_proj.weight"])
        for name in ("0.25", "0.5", "0.75"):
            record = json.loads((layer / "ffn" / f"{name}.json").read_text())
            assert record["status"] == "trained"
            assert record["validation_loss_after"] < record["validation_loss_before"]


def test_a_nest_is_trained_as_a_whole(parent, corpus, tmp_path):
    """One width more, or one block lost, and all of it is trained again; what stands apart is kept. One width alone is no nest."""
    lib, more = tmp_path / "lib", {**NEST, "attention": "none", "ffn": "0.5,0.25"}
    build_library(str(parent), options(corpus, lib, **more))
    first = hashes(lib / "blocks")
    (lib / "blocks" / "L01" / "ffn" / "0.25.safetensors").unlink()
    build_library(str(parent), options(corpus, lib, **more))
    assert hashes(lib / "blocks") == first
    build_library(str(parent), options(corpus, lib, **{**more, "ffn": "0.75,0.5,0.25"}))
    changed = hashes(lib / "blocks")
    assert {name for name in first if first[name] != changed[name]} == {n for n in first if "/ffn/" in n}
    for name, nested in (("alone", False), ("nest-of-one", True)):
        build_library(str(parent), options(corpus, tmp_path / name, ffn="0.5", attention="parent", nested=nested))
    assert hashes(tmp_path / "alone") == hashes(tmp_path / "nest-of-one")


def test_a_nest_costs_what_its_widest_does(parent, corpus, tmp_path):
    def plan(nested: bool):
        return Builder(open_model(str(parent)), options(corpus, tmp_path / "x", **{**NEST, "nested": nested})).plan()

    alone = Builder(open_model(str(parent)), options(corpus, tmp_path / "x", **{**NEST, "ffn": "0.75"})).plan()
    assert plan(True).flops == alone.flops < plan(False).flops
    assert plan(True).num_trained_parameters == alone.num_trained_parameters < plan(False).num_trained_parameters
    assert alone.disk_bytes < plan(True).disk_bytes < plan(False).disk_bytes
    assert plan(True).peak_memory_bytes < plan(False).peak_memory_bytes
