"""`puzzle grow`: the same logits before training for every FFN that can grow, and a refusal by name for every one that cannot."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fp8_parents import store_in_fp8
from puzzle.blocklib.linear import Linear
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.fuse.rewrite import fuse_layers
from puzzle.parents.grown import new_tensors
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from tiny_parents import write_tiny_parent

IDS = torch.randint(2, 384, (2, 33), generator=torch.Generator().manual_seed(3))
SHAPES = {  # families whose FFNs differ in kind, activation, norms or place, at odd sizes
    "llama": ("--experts", 3),
    "gemma3": ("--experts", 5, "--top-k", 2, "--width", 17),  # GeGLU, norms before and after whose scale is 1 + weight
    "olmo2": ("--experts", 1, "--layers", "0,2-3"),  # norms after; one layer stays dense
    "granite": ("--experts", 7, "--top-k", 3, "--width", 51),  # four multipliers
    "granitemoehybrid, Mamba-2 and dense FFNs": ("--experts", 3),
    "nemotron_h": ("--experts", 3, "--top-k", 2, "--width", 11, "--seed", 4),  # squared ReLUs without a gate
}


def logits(directory) -> torch.Tensor:
    """Of transformers, by the model code that lies there."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()
    return model(IDS).logits


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to 1e-5 of their deviation."""
    return bool((one - other).abs().max() <= 1e-5 * one.std())


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_a_grown_model_starts_as_the_same_function(puzzle, tmp_path, name):
    """In our runtime, in transformers and after an export; once the new experts have anything to say, it is another one."""
    parent, out = write_tiny_parent(name, tmp_path / "parent"), tmp_path / "grown"
    done = puzzle("grow", parent, *SHAPES[name], "--out", out, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    old, new = load_model(parent), load_model(out)
    assert near(old(IDS), new(IDS))
    assert near(old(IDS), logits(out))
    exported = puzzle("export", out, "--out", tmp_path / "exported")
    assert exported.exit_code == 0, (exported.output, exported.exception)
    assert near(old(IDS), logits(tmp_path / "exported"))
    told, names = json.loads(done.stdout), new_tensors(out)
    tensors = load_file(out / "model.safetensors")
    assert told["num_parameters"] == [open_model(path).structure.num_parameters for path in (parent, out)]
    assert told["new_parameters"] == sum(tensors[n].numel() for n in names)
    assert told["num_bytes"][1] == sum(tensor.nbytes for tensor in tensors.values())
    for index in told["layers"]:
        new.blocks[index].ffn.experts.down_proj.normal_(std=0.1)
    assert not near(old(IDS), new(IDS))


@torch.no_grad()
def test_a_grown_nemotron_h_is_a_stock_checkpoint(puzzle, one_line_error, parent, tmp_path):
    """Sigmoids with a bias beside a shared expert are what NemotronHForCausalLM has; what the other formats lack is named."""
    qwen = write_tiny_parent("qwen3", tmp_path / "qwen")
    for source, name, words in (
        (qwen, "qwen3-moe", "shared_intermediate_size 52 beside None"),
        (parent, "granitemoehybrid", "router sigmoid"),
    ):
        assert puzzle("grow", source, "--experts", 4, "--out", tmp_path / name).exit_code == 0
        done = puzzle("export", tmp_path / name, "--format", name, "--out", tmp_path / "x")
        one_line_error(done, "layer 0 ffn", words, "write --format hf")
    parent, out = write_tiny_parent("nemotron_h", tmp_path / "parent"), tmp_path / "grown"
    assert puzzle("grow", parent, "--experts", 4, "--top-k", 2, "--out", out).exit_code == 0
    assert puzzle("export", out, "--format", "nemotron-h", "--out", tmp_path / "stock").exit_code == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    assert type(stock).__name__ == "NemotronHForCausalLM"
    assert near(load_model(parent)(IDS), stock(IDS).logits)
    assert near(load_model(parent)(IDS), load_model(tmp_path / "stock")(IDS))


@torch.no_grad()
def test_children_grow(puzzle, one_line_error, child, tmp_path):
    """One with layers of other widths and without FFN, and one with a fused FFN; a second growth is refused, and so is a narrow layer."""
    done = puzzle("grow", child, "--experts", 2, "--out", tmp_path / "grown", "--json")
    assert json.loads(done.stdout)["layers"] == [0, 1, 2]
    assert [b.ffn.sub_block.moe_intermediate_size for b in load_model(tmp_path / "grown").blocks[:3]] == [96, 96, 48]
    assert near(load_model(child)(IDS), load_model(tmp_path / "grown")(IDS))
    again = ("--experts", 2, "--out", tmp_path / "x")
    one_line_error(puzzle("grow", tmp_path / "grown", *again), "a mixture of experts already, no FFN")
    one_line_error(puzzle("grow", child, *again, "--width", 64), "--width 64", "layer 2 has 48")
    one_line_error(puzzle("grow", child, *again, "--layers", "1-3"), "layer 3 cannot grow: it has no FFN")
    whole = child_of_checkpoint(child)
    order = (0, 1, 1, 2)
    layers = tuple(replace(whole.layers[index], origin=place) for place, index in enumerate(order))
    fused = fuse_layers(replace(whole, layers=layers), [(1, 2)])
    write_hf(fused, tmp_path / "fused", "card")
    assert puzzle("grow", tmp_path / "fused", "--experts", 2, "--layers", 1, "--out", tmp_path / "wide").exit_code == 0
    assert near(load_model(tmp_path / "fused")(IDS), load_model(tmp_path / "wide")(IDS))


def test_experts_are_told_apart_and_drawn_by_the_seed(puzzle, tmp_path):
    """Narrow experts share no channel while there are enough, each is a part of the FFN, and a seed gives the same bits."""
    parent = write_tiny_parent("llama", tmp_path / "parent")
    found = []
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        asked = ("--experts", 4, "--width", 13, "--seed", seed, "--out", tmp_path / out)
        assert puzzle("grow", parent, *asked).exit_code == 0
        found.append(load_file(tmp_path / out / "model.safetensors"))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
    ours = "model.layers.2.mlp."
    assert not torch.equal(found[0][f"{ours}gate.weight"], found[2][f"{ours}gate.weight"])
    rows = found[0][f"{ours}experts.up_proj"].flatten(0, 1)
    whole = load_file(parent / "model.safetensors")[f"{ours}up_proj.weight"]
    assert {tuple(row.tolist()) for row in rows} == {tuple(row.tolist()) for row in whole}
    assert len(rows) == len(whole)
    assert not found[0][f"{ours}experts.down_proj"].any()


def test_a_grown_model_is_a_parent(puzzle, make_parent, corpus, build_options, tmp_path):
    """Its library offers fewer experts and a dense FFN."""
    parent, out = make_parent(tmp_path / "parent", corpus), tmp_path / "grown"
    assert puzzle("grow", parent, "--experts", 4, "--top-k", 2, "--layers", "1", "--out", out).exit_code == 0
    offered = ("--layers", "1", "--attention", "none", "--ffn", "experts=2,dense=1.0")
    done = puzzle("build-library", out, "--data", corpus, "--out", tmp_path / "lib", *build_options, *offered)
    assert done.exit_code == 0, (done.output, done.exception)


def test_a_dry_run_says_what_is_written_and_writes_nothing(puzzle, parent, tmp_path):
    asked = ("grow", parent, "--experts", 3, "--out", tmp_path / "x", "--json")
    told = json.loads(puzzle(*asked, "--dry-run").stdout)
    assert not (tmp_path / "x").exists()
    written = json.loads(puzzle(*asked).stdout)
    assert told == written | {"dry_run": True}
    assert told["active_parameters"][1] < told["num_parameters"][1]
    assert "new parameters in layers 0, 1, 2, 3" in puzzle(*asked[:-1], "--dry-run").stderr
    assert "is not empty" in puzzle(*asked).stderr


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--experts", 0), "--experts 0: must be above 0"),
        (("--experts", 2, "--top-k", 3), "--top-k 3: a token cannot have more than --experts 2"),
        (("--experts", 2, "--width", 97), "--width 97: new experts start as channels of the FFN, and layer 0 has 96"),
        (("--experts", 2, "--layers", "3-4"), "--layers 3-4: '3-4' is outside"),
        (("--experts", 2, "--max-shard", "some"), "--max-shard 'some'"),
    ],
)
def test_refusals(puzzle, one_line_error, parent, tmp_path, options, wanted):
    one_line_error(puzzle("grow", parent, *options, "--out", tmp_path / "x"), wanted)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama tied, with biases", "an FFN with biases, which experts have no place for"),
        ("nemotron_h with experts", "no FFN, a mixture of experts already"),
    ],
)
def test_what_no_layer_can_grow_from(puzzle, one_line_error, tmp_path, name, wanted):
    parent = write_tiny_parent(name, tmp_path / "parent")
    one_line_error(puzzle("grow", parent, "--experts", 2, "--out", tmp_path / "x"), "no FFN that can be grown", wanted)


def test_linear_ffns_and_fp8_are_refused(puzzle, one_line_error, tmp_path):
    parent = write_tiny_parent("llama", tmp_path / "parent")
    asked = ("--experts", 2, "--out", tmp_path / "x")
    child = child_of_checkpoint(parent)
    linear = Linear(**child.ffn.norm_fields())
    tensors = {"norm.weight": torch.ones(36), "linear.weight": torch.eye(36)}
    layers = (child.layers[0].put("ffn", linear, lambda: tensors), *child.layers[1:])
    write_hf(replace(child, layers=layers), tmp_path / "linear", "card")
    done = puzzle("grow", tmp_path / "linear", *asked, "--layers", "0")
    one_line_error(done, "layer 0 cannot grow: it has an FFN of kind 'linear', which has no channels")
    store_in_fp8(parent, "odd blocks")
    one_line_error(puzzle("grow", parent, *asked), "is in fp8: grow the checkpoint in bf16")
