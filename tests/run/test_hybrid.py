"""A hybrid parent along the whole road: what stands in for Mamba-2, attention and squared ReLUs, what it keeps, how it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import ParentBlock
from puzzle.blocklib.variant import variant_of
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.library.manifest import Library
from puzzle.library.store import BlockStore
from puzzle.measure.architecture import read_architecture
from puzzle.parents.opened import open_model
from puzzle.profile.cost_table import CostTable
from puzzle.profile.grid import Grid
from puzzle.profile.parts import priced_as
from puzzle.profile.profile import profile, subject_of
from puzzle.runtime.model import load_model
from puzzle.runtime.plain import PlainRuntime
from tiny_parents import write_tiny_parent

VARIANTS = "heads3,dim4,mamba2-6x7-g3-s11,window-8,kv1,linear,none"
SIZES = ("--tokens", 512, "--seq-len", 32, "--batch-size", 4, "--calibration-sequences", 4)
HELD = ("--validation-sequences", 2, "--score-sequences", 2)
GRID = ("--batches", "1,4", "--prefill", 16, "--contexts", "16,32", "--seconds", 0.001, "--rounds", 1)
GOAL = ("--gpu", "cpu", "--input-len", 16, "--output-len", 16)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory, parent) -> Path:
    """Blocks M-*M-M with the tokenizer of the tiny Llama."""
    out = write_tiny_parent("nemotron_h", tmp_path_factory.mktemp("hybrid") / "parent")
    for file in parent.glob("token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.fixture(scope="module")
def library(hybrid, corpus, puzzle) -> Path:
    out = hybrid.with_name("library")
    for arguments in (
        (
            "build-library",
            hybrid,
            "--data",
            corpus,
            "--out",
            out,
            "--attention",
            VARIANTS,
            "--ffn",
            "0.5,none",
            *SIZES,
            *HELD,
        ),
        ("profile", out, "--gpu", "cpu", *GRID),
    ):
        done = puzzle(*arguments)
        assert done.exit_code == 0, done.output
    return out


def test_each_place_is_offered_what_it_can_take(library):
    spaces = Library.open(library).spaces
    mamba = ["parent", "heads3", "dim4", "linear", "none"]
    attention = ["parent", "mamba2-6x7-g3-s11", "window-8", "kv1", "linear", "none"]
    for layer, (mixes, width) in enumerate(zip("M-*M-M", (0, 1, 0, 0, 1, 0), strict=True)):
        assert list(spaces[layer]["attention"]) == {"M": mamba, "*": attention, "-": ["parent"]}[mixes]
        assert list(spaces[layer]["ffn"]) == (["parent", "0.5", "none"] if width else ["parent"])
    store = BlockStore(library)
    for layer, slot, name in ((0, "attention", "heads3"), (2, "attention", "mamba2-6x7-g3-s11"), (1, "ffn", "0.5")):
        record = store.record(layer, slot, name)
        assert record["validation_loss_after"] < record["validation_loss_before"], (layer, name)
    scores = json.loads((library / "scores/L02.json").read_text())["scores"]
    assert all(scores[f"attention/{name}"]["kl"] > 0 for name in attention[1:])


def test_a_gpus_table_has_rows_for_them(library, puzzle, tmp_path):
    """Timed by the runtime on kernels (here their plain twins): Mamba-2 at every context, squared ReLUs by rows alone."""
    opened = Library.open(library)
    small = Grid(
        batches=(1, 4),
        prompts=((1, 16),),
        contexts=(16, 32),
        rows=(16,),
        by_rows=True,
        whole=True,
        seconds=0.001,
        min_samples=1,
        rounds=1,
    )
    table = CostTable(profile(subject_of(opened), gpu="h100", out=tmp_path, device="cpu", grid=small)[0])
    mamba, relu2 = opened.structure.layers[0]["attention"], opened.structure.layers[1]["ffn"]
    assert {priced_as(b) for b in opened.sub_blocks() if not isinstance(b, NoOp)} <= set(table.parts())
    for part in (mamba, relu2):
        assert table.seconds(part, "decode", 4, 32) > 0
        assert table.seconds(part, "prefill", 1, 16) > 0


def solve(puzzle, library: Path, out: Path, *goal) -> Path:
    done = puzzle("solve", library, *GOAL, *goal, "--out", out)
    assert done.exit_code == 0, done.output
    return out


def test_memory_is_weights_tokens_and_what_does_not_grow(library, hybrid, puzzle, tmp_path):
    """At the batch that was chosen, for parent and child; the runtime holds as many bytes of states."""
    solved = read_architecture(solve(puzzle, library, tmp_path / "solution", "--memory", "80%", "--concurrency", 4))
    parent = open_model(hybrid).structure
    for structure, found in (
        (parent, solved.parent_predicted),
        (parent.with_layers(solved.sub_blocks), solved.predicted),
    ):
        states = [sub_block.state() for _, _, sub_block in structure]
        assert found.batch == 4
        assert found.state_bytes == sum(4 * s.per_sequence + s.own_bytes for s in states)
        kept = sum(state.num_bytes(32, "float32") for state in states)
        weights = PRECISION_BYTES["float32"] * sum(b.num_parameters for _, _, b in structure)
        fixed = FIXED_BYTES["float32"] * structure.num_fixed_parameters
        assert found.memory_bytes - found.workspace_bytes == weights + fixed + 4 * kept
    assert solved.parent_predicted.state_bytes == 3 * 4 * (6 * 7 * 11 + 3 * (6 * 7 + 2 * 3 * 11))
    assert solved.predicted.memory_bytes <= 0.8 * solved.parent_predicted.memory_bytes
    states = [b.state().num_bytes(32, "float32") for _, _, b in parent]
    assert PlainRuntime(load_model(hybrid), 4, 32).state_bytes == 4 * sum(states)


def test_a_child_of_every_kind_is_written_and_measured(library, hybrid, corpus, puzzle, tmp_path):
    """Fewer heads here, attention that has become Mamba-2, half an FFN, layers gone: equal in our runtime and in transformers."""
    solution = solve(puzzle, library, tmp_path / "solution", "--params", "95%")
    solved = json.loads((solution / "architecture.json").read_text())
    spaces = Library.open(library).spaces
    for layer, slot, name in (
        (0, "attention", "heads3"),
        (2, "attention", "mamba2-6x7-g3-s11"),
        (4, "ffn", "0.5"),
        (5, "attention", "none"),
    ):
        solved["layers"][layer][slot] = {
            "variant": name,
            "sub_block": spaces[layer][slot][name].key(),
            "precision": "float32",
        }
    (solution / "architecture.json").write_text(json.dumps(solved))
    child = tmp_path / "child"
    done = puzzle("export", library, solution, "--out", child)
    assert done.exit_code == 0, done.output
    config = json.loads((child / "config.json").read_text())
    assert config["hidden_act"] == "relu2"
    assert config["per_layer_config"]["0"]["mamba"] == {
        "num_heads": 3,
        "head_dim": 7,
        "num_groups": 3,
        "state_size": 11,
        "chunk_size": 8,
    }
    structure = open_model(child).structure
    assert isinstance(structure.layers[2]["attention"], Mamba2)
    ids = torch.randint(2, 384, (2, 29), generator=torch.Generator().manual_seed(0))
    ours = load_model(child)
    theirs = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-4
    text = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=1)[:, 29:]
    assert torch.equal(PlainRuntime(ours, 2, 41).generate(ids, 12), text)
    done = puzzle(
        "evaluate", hybrid, child, "--data", corpus, "--sequences", 2, "--seq-len", 32, "--no-speed", "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["child"]["kl"] > 0
    assert found["child"]["state_bytes"] == sum(b.state().fixed_bytes("float32") for _, _, b in structure)
    done = puzzle("export", library, solution, "--format", "nemotron-h-puzzle", "--out", tmp_path / "other")
    assert done.exit_code == 2
    assert "layer 2 attention: num_heads is 6, and 3 in layer 0 attention" in " ".join(done.output.split())


def test_experts_of_a_hybrid_along_the_road(hybrid, corpus, puzzle, tmp_path):
    """Blocks ME*EM: fewer experts here, a dense FFN of squared ReLUs there; a token's parameters; a child that says both in its entries."""
    parent = write_tiny_parent("nemotron_h with experts", tmp_path / "parent")
    for file in hybrid.glob("token*"):
        (parent / file.name).write_bytes(file.read_bytes())
    library, solution, child = (tmp_path / name for name in ("library", "solution", "child"))
    offered = ("--attention", "heads2,none", "--ffn", "experts=4-topk=1,dense=24,none")
    for arguments in (
        ("build-library", parent, "--data", corpus, "--out", library, *offered, *SIZES, *HELD),
        ("profile", library, "--gpu", "cpu", *GRID),
        ("solve", library, *GOAL, "--active-params", "95%", "--out", solution),
    ):
        done = puzzle(*arguments)
        assert done.exit_code == 0, done.output
    spaces, record = Library.open(library).spaces, BlockStore(library).record(1, "ffn", "experts=4-topk=1")
    assert list(spaces[1]["ffn"]) == ["parent", "experts=4-topk=1", "dense=24", "none"]
    assert len(record["expert_load"]) == 4
    assert record["validation_loss_after"] < record["validation_loss_before"]
    solved = json.loads((solution / "architecture.json").read_text())
    for layer, name in ((1, "experts=4-topk=1"), (3, "dense=24")):
        key = spaces[layer]["ffn"][name].key()
        solved["layers"][layer]["ffn"] = {"variant": name, "sub_block": key, "precision": "float32"}
    (solution / "architecture.json").write_text(json.dumps(solved))
    done = puzzle("export", library, solution, "--format", "nemotron-h-puzzle", "--out", child)
    assert done.exit_code == 0, done.output
    entries = json.loads((child / "config.json").read_text())["block_configs"]
    assert [(e["block_type"], e.get("n_routed_experts"), e.get("intermediate_size")) for e in entries if e["block_type"][0] == "m"
            and e["block_type"] != "mamba"] == [("moe", 4, None), ("mlp", None, 24)]  # fmt: skip
    ids = torch.randint(2, 384, (2, 29), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (theirs(ids).logits - load_model(child)(ids)).abs().max() <= 1e-4
    done = puzzle("export", child, "--format", "hf", "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert torch.equal(load_model(tmp_path / "again")(ids), load_model(child)(ids))


@torch.no_grad()
@pytest.mark.parametrize(
    ("offered", "kind"),
    [("mamba2-4x9-g2-s5", "mamba2"), ("gdn", "gated_delta"), ("gdn-2x5-4x7-nogate", "gated_delta")],
)
def test_attention_of_a_llama_becomes_recurrent(offered, kind, tmp_path):
    """In a layer that keeps its gated FFN, with multipliers (Granite) and norms after (OLMo-2) too: as transformers reads it."""
    for name in ("llama", "granite", "olmo2"):
        child = child_of_checkpoint(write_tiny_parent(name, tmp_path / name))
        variant = variant_of(child.layers[1].slots["attention"], offered)
        own = ParentBlock(sub_block=child.layers[1].slots["attention"], weights=child.layers[1].read("attention"))
        weights = {
            n: t + 0.1 * torch.randn_like(t) for n, t in variant.initialise(own).items()
        }  # gates that begin at 0
        layers = list(child.layers)
        layers[1] = layers[1].put("attention", variant.sub_block, lambda weights=weights: dict(weights))
        write_hf(replace(child, layers=tuple(layers)), tmp_path / f"{name}-child", "")
        ours = load_model(tmp_path / f"{name}-child")
        assert [part.sub_block.kind for _, slot, part in ours.parts() if slot == "attention"] == [
            "gqa",
            kind,
            "gqa",
            "gqa",
        ]
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"{name}-child", trust_remote_code=True, dtype=torch.float32
        )
        ids = torch.randint(2, 384, (2, 29), generator=torch.Generator().manual_seed(0))
        assert (theirs(ids).logits - ours(ids)).abs().max() <= 1e-4
        text = theirs.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=1)[:, 29:]
        assert torch.equal(PlainRuntime(ours, 2, 38).generate(ids, 9), text)
