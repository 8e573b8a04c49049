"""Gated DeltaNet in place of attention along the whole road: trained, priced, solved for, written, served or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES
from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.library.manifest import Library
from puzzle.library.store import BlockStore
from puzzle.measure.architecture import read_architecture
from puzzle.parents.opened import open_model
from puzzle.profile.cost_table import CostTable
from puzzle.profile.grid import Grid
from puzzle.profile.profile import profile, subject_of
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import load_model
from puzzle.runtime.plain import PlainRuntime
from puzzle.serving.vllm_plugin import seen_by_engine

NAMES = ("gdn", "gdn-1x8-2x6-nogate")
SIZES = ("--tokens", 2048, "--seq-len", 32, "--batch-size", 4, "--calibration-sequences", 4)
HELD = ("--validation-sequences", 4, "--score-sequences", 2)
GRID = ("--batches", "1,4", "--prefill", 16, "--contexts", "16,32", "--seconds", 0.001, "--rounds", 1)
GOAL = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16, "--concurrency", 4)


@pytest.fixture(scope="module")
def library(parent, corpus, puzzle, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("delta") / "library"
    offered = ("--attention", ",".join((*NAMES, "none")), "--ffn", "none")
    for arguments in (
        ("build-library", parent, "--data", corpus, "--out", out, *offered, *SIZES, *HELD),
        ("profile", out, "--gpu", "cpu", *GRID),
    ):
        done = puzzle(*arguments)
        assert done.exit_code == 0, done.output
    return out


def test_blocks_learn(library):
    store = BlockStore(library)
    for layer in range(4):
        for name in NAMES:
            record = store.record(layer, "attention", name)
            assert record["validation_loss_after"] < record["validation_loss_before"], (layer, name)
    assert store.record(0, "attention", "gdn")["validation_loss_before"] == pytest.approx(1, abs=1e-6)  # adds nothing


@pytest.fixture(scope="module")
def child(library, puzzle) -> Path:
    """Gated DeltaNet of both kinds beside attention."""
    solution, out, spaces = library.with_name("solution"), library.with_name("child"), Library.open(library).spaces
    done = puzzle("solve", library, *GOAL, "--memory", "99%", "--out", solution)
    assert done.exit_code == 0, done.output
    solved = json.loads((solution / "architecture.json").read_text())
    for layer, name in ((0, NAMES[0]), (1, "parent"), (2, NAMES[1]), (3, "parent")):
        choice = {"variant": name, "sub_block": spaces[layer]["attention"][name].key(), "precision": "float32"}
        solved["layers"][layer]["attention"] = choice
    forced = library.with_name("forced")
    forced.mkdir()
    (forced / "architecture.json").write_text(json.dumps(solved))
    done = puzzle("export", library, forced, "--out", out)
    assert done.exit_code == 0, done.output
    return out


def test_memory_is_weights_tokens_and_states(library, child, parent):
    found = read_architecture(library.with_name("solution"))
    whole = open_model(parent).structure
    structure = whole.with_layers(found.sub_blocks)
    kept = sum(sub_block.state().num_bytes(32, "float32") for _, _, sub_block in structure)
    weights = PRECISION_BYTES["float32"] * sum(b.num_parameters for _, _, b in structure)
    fixed = FIXED_BYTES["float32"] * structure.num_fixed_parameters
    predicted = found.predicted
    assert predicted.memory_bytes - predicted.workspace_bytes == weights + fixed + predicted.batch * kept
    made = open_model(child).structure
    kept = [b.state().num_bytes(32, "float32") for _, _, b in made]
    assert PlainRuntime(load_model(child), 4, 32).state_bytes == 4 * sum(kept)
    states = [b.state() for _, _, b in made if isinstance(b, GatedDelta)]
    assert [s.own_bytes for s in states] == [4 * 4 * 8 * 8, 4 * 2 * 8 * 6]
    assert [s.per_sequence for s in states] == [3 * 3 * 32, 3 * (2 * 8 + 12)]


def test_a_gpus_table_has_rows_for_it(library, tmp_path):
    opened = Library.open(library)
    small = Grid(
        batches=(1, 4), prompts=((1, 16),), contexts=(16, 32), rows=(16,), by_rows=True, whole=True, seconds=0.001,
        min_samples=1, rounds=1,
    )  # fmt: skip
    table = CostTable(profile(subject_of(opened), gpu="h100", out=tmp_path, device="cpu", grid=small)[0])
    for name in NAMES:
        made = opened.spaces[0]["attention"][name]
        assert table.seconds(made, "decode", 4, 32) > 0
        assert table.seconds(made, "prefill", 1, 16) > 0


@torch.no_grad()
def test_the_child_is_one_model_everywhere(child, monkeypatch):
    """transformers with the code that goes along, our plain runtime and the one on kernels; prompts of several lengths."""
    config = json.loads((child / "config.json").read_text())
    sizes = {"num_key_heads": 4, "key_dim": 8, "num_value_heads": 4, "value_dim": 8}
    assert config["per_layer_config"]["0"]["gated_delta"] == sizes
    ours = load_model(child)
    theirs = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.float32).eval()
    for length in (1, 2, 29, 67):
        ids = torch.randint(2, 384, (2, length), generator=torch.Generator().manual_seed(length))
        assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-4
        text = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)[:, length:]
        assert torch.equal(PlainRuntime(ours, 2, length + 12).generate(ids, 12), text)
        fast = FastRuntime(ours, 2, length + 12)
        assert torch.equal(fast.generate(ids, 12), text)
    own = [part.state_bytes for part in fast.parts if part.sub_block.kind == "gated_delta"]
    states = PlainRuntime(ours, 2, 79)
    assert own == [
        s.num_bytes for s, p in zip(states.states, states.parts, strict=True) if p.sub_block.kind == "gated_delta"
    ]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--format", "nemotron-nas"), "layer 0 attention: a reader of nemotron-nas has no sub-blocks of kind 'gated_delta': write --format hf"),
        (("--engine", "vllm"), "layer 0 attention: vllm has no sub-blocks of kind 'gated_delta': write --format hf"),
        (("--format", "gguf"), "layer 0 attention: llama.cpp has no sub-blocks of kind 'gated_delta': write --format hf"),
        (("--format", "granitemoehybrid"), "layer 0 attention: --format granitemoehybrid has no place for 'gated_delta h32 "),
        (("--format", "nemotron-h-puzzle"), "has no sub-blocks of kind 'gated_delta'"),
        (("--dtype", "fp8"), "layer 0 attention: sub-blocks of kind 'gated_delta' have no form in fp8"),
    ],
)  # fmt: skip
def test_formats_that_cannot_hold_it(options, wanted, child, puzzle, one_line_error, tmp_path):
    done = puzzle("export", child, *options, "--out", tmp_path / "out")
    assert done.exit_code == 2
    one_line_error(done, wanted)
    assert not (tmp_path / "out").exists()


def test_vllm_is_told_that_it_cannot_without_a_gate(child, puzzle, one_line_error):
    """By the plug-in in vLLM's own process, by serve-check before one starts; and the card names no command for it."""
    wanted = "sub-blocks of kind 'gated_delta' have no face in vLLM without a gate"
    with pytest.raises(ValueError, match=wanted):
        seen_by_engine(json.loads((child / "config.json").read_text()))
    done = puzzle("serve-check", child, "--engine", "vllm")
    assert done.exit_code == 2
    one_line_error(done, wanted)
    card = (child / "README.md").read_text()
    assert "from_pretrained" in card
    assert "vllm serve" not in card
