"""Children of a mixture-of-experts parent: uniform ones in the stock format, the others in ours, refused by name elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from puzzle.base.errors import UserError
from puzzle.blocklib.variant import variant_of
from puzzle.export.write import Source, export, open_source
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from tiny_children import EXPERTS, WIDE, Tiny, build
from tiny_parents import write_tiny_parent

IDS = torch.randint(2, 384, (2, 33), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return write_tiny_parent("qwen3_moe", tmp_path_factory.mktemp("moe") / "parent")


def child_of(parent: Path, changes: dict[int, dict[str, str]]) -> Source:
    """changes: {layer: {slot: variant}}; a variant that needs statistics gets them of random streams."""
    source, opened = open_source(parent), open_model(parent)
    model, layers = load_model(opened), list(source.child.layers)
    for index, chosen in changes.items():
        for slot, name in chosen.items():
            block = opened.block(index, slot)
            part = getattr(model.blocks[index], slot)
            x = torch.randn(2, 40, 36, generator=torch.Generator().manual_seed(index))
            block.statistics, block.moments = part.calibrate([x]), partial(part.moments, [x], model.ropes(40))
            variant = variant_of(block.sub_block, name, slot)
            layers[index] = layers[index].put(slot, variant.sub_block, partial(dict, variant.initialise(block)))
    return replace(source, child=replace(source.child, layers=tuple(layers)))


def theirs(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


UNIFORM = {
    "as it is": {},
    "fewer, narrower, fewer a token": {n: {"ffn": "experts=4-topk=2-width=16"} for n in (0, 1, 3)},
    "merged, dense ones narrower": {n: {"ffn": "0.5" if n == 2 else "merged=3"} for n in range(4)},
    "one more dense layer": {0: {"ffn": "dense=52"}, 1: {"ffn": "topk=1"}, 3: {"ffn": "topk=1"}},
    "fewer KV heads": {n: {"attention": "kv1"} for n in range(4)},
    "an empty layer": {1: {"attention": "none", "ffn": "none"}},
}


@torch.no_grad()
@pytest.mark.parametrize("case", UNIFORM)
def test_a_uniform_child_is_a_stock_checkpoint(case, parent, tmp_path):
    source = child_of(parent, UNIFORM[case])
    ours = export(source, tmp_path / "ours").out
    stock = export(source, tmp_path / "stock", format="qwen3-moe").out
    assert not list(stock.glob("*.py"))
    model = theirs(stock)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    wanted = load_model(ours)(IDS)
    assert (model(IDS).logits - wanted).abs().max() <= 1e-4
    assert (load_model(stock)(IDS) - wanted).abs().max() <= 1e-5
    again = export(open_source(stock), tmp_path / "again")
    assert (theirs(again.out, trust_remote_code=True)(IDS).logits - wanted).abs().max() <= 1e-4
    if not UNIFORM[case]:
        assert load_file(stock / "model.safetensors").keys() == load_file(parent / "model.safetensors").keys()


OTHERS = {
    "experts": ({1: {"ffn": "experts=4"}}, "layer 1 ffn: `format` qwen3-moe .* num_experts 4 beside 5"),
    "a token's experts": ({3: {"ffn": "topk=1"}}, "layer 3 ffn: .* num_experts_per_tok 1 beside 3"),
    "width of experts": ({0: {"ffn": "width=16"}}, "layer 0 ffn: .* moe_intermediate_size 16 beside 20"),
    "width of dense layers": (
        {0: {"ffn": "dense=52"}, 1: {"ffn": "dense=24"}}, "layer 1 ffn: .* intermediate_size 24 beside 52"),
    "no FFN": ({1: {"ffn": "none"}}, "layer 1 ffn: `format` qwen3-moe has no place for 'none'"),
    "a matrix": ({1: {"ffn": "linear"}}, "layer 1 ffn: .* no place for 'linear h36'"),
    "no attention": ({2: {"attention": "none"}}, "layer 2 attention: .* no place for 'none'"),
    "KV heads": ({2: {"attention": "kv1"}}, "layer 2 attention: .* num_key_value_heads 1 beside 2"),
    "a window": ({2: {"attention": "window-4"}}, "layer 2 attention: .* window 4 beside None"),
    "windows": ({n: {"attention": "window-4"} for n in range(4)}, "has windows of 4 tokens, which engines pass over"),
    "no mixture": ({n: {"ffn": "none"} for n in range(4)}, "has no mixture of experts"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", OTHERS)
def test_a_mixed_child_is_refused_by_name_and_written_as_hf(case, parent, tmp_path, refused_but_written_as_hf):
    changes, message = OTHERS[case]
    source = child_of(parent, changes)
    with pytest.raises(UserError, match=r"`format` hf"):
        export(source, tmp_path / "stock", engine="vllm")
    refused_but_written_as_hf(source, "qwen3-moe", message, IDS)


@torch.no_grad()
@pytest.mark.parametrize("format", ["qwen3-moe", "granitemoehybrid"])
@pytest.mark.parametrize("act", ["gelu_tanh", "relu2", "swiglu_oai"])
def test_activations_are_those_of_the_stock_code_or_refused(format, act, tmp_path):
    """Which gates relu2 too, and has no clamped one: as parents and as what we write."""
    shared = None if format == "qwen3-moe" or act == "swiglu_oai" else 64
    attends = replace(WIDE, qk_norm="head" if format == "qwen3-moe" else None)
    experts = replace(EXPERTS, activation=act, shared_gate=False, shared_intermediate_size=shared)
    made = build(act, Tiny(base=(attends, experts), layers=((attends, experts),) * 2))
    source = Source(child=made, solved=None, facts=None, measured=None)
    ours = export(source, tmp_path / "ours").out
    wanted = load_model(ours)(IDS)
    assert (theirs(ours, trust_remote_code=True)(IDS).logits - wanted).abs().max() <= 1e-4
    if act != "gelu_tanh":
        message = (
            "without a shared one"
            if format != "qwen3-moe" and shared is None
            else f"hidden_act '{act}' is not supported; .*`format` hf"
        )
        with pytest.raises(UserError, match=message):
            export(source, tmp_path / "stock", format=format)
        assert not (tmp_path / "stock").exists()
        return
    stock = export(source, tmp_path / "stock", format=format).out
    assert (theirs(stock)(IDS).logits - wanted).abs().max() <= 1e-4
    assert (load_model(stock)(IDS) - wanted).abs().max() <= 1e-5
    config = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(config | {"hidden_act": "relu2"}))
    with pytest.raises(UserError, match="hidden_act 'relu2' is not supported"):
        open_model(stock)


def test_an_engine_is_told_of_the_stock_format(parent, tmp_path):
    with pytest.raises(UserError, match=r"vllm has no per-head norms .*: write `format` qwen3-moe, if all"):
        export(open_source(parent), tmp_path / "child", engine="vllm")
    assert export(open_source(parent), tmp_path / "child", engine="vllm", format="qwen3-moe").engine == "vllm"
    with pytest.raises(UserError, match="`engine` mlx does not read `format` qwen3-moe"):
        export(open_source(parent), tmp_path / "other", engine="mlx", format="qwen3-moe")
    with pytest.raises(UserError, match="`dtype` fp8 with `format` qwen3-moe"):
        export(open_source(parent), tmp_path / "other", format="qwen3-moe", dtype="fp8")
    with pytest.raises(UserError, match=r"sub-blocks of kind 'moe' have no form in fp8"):
        export(open_source(parent), tmp_path / "other", dtype="fp8")


# -- layouts of checkpoints ----------------------------------------------------------------------------------


def fuse(weights: dict) -> dict:
    """Experts one by one -> stacked, gate and up together, as transformers holds them."""
    found = {n: t for n, t in weights.items() if ".experts." not in n}
    for layer in {n.partition(".experts.")[0] for n in weights if ".experts." in n}:
        stacked = {
            m: torch.stack([weights[f"{layer}.experts.{e}.{m}.weight"] for e in range(5)])
            for m in ("gate_proj", "up_proj", "down_proj")
        }
        found[f"{layer}.experts.gate_up_proj"] = torch.cat((stacked["gate_proj"], stacked["up_proj"]), dim=1)
        found[f"{layer}.experts.down_proj"] = stacked["down_proj"]
    return found


@torch.no_grad()
def test_fused_experts_are_read(parent, tmp_path):
    (tmp_path / "config.json").write_text((parent / "config.json").read_text())
    save_file(fuse(load_file(parent / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(tmp_path)(IDS), load_model(parent)(IDS))
    assert (theirs(tmp_path)(IDS).logits - load_model(parent)(IDS)).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            "lacks the weight model.layers.1.mlp.experts.3.up_proj.weight",
        ),
        (
            lambda w: w.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(19, 36)}),
            r"model.layers.1.mlp.experts.3.up_proj.weight .* has shape \[19, 36\], config.json asks for \[20, 36\]",
        ),
        (
            lambda w: w["model.layers.1.mlp.experts.3.up_proj.weight"].fill_(torch.nan),
            "weight model.layers.1.mlp.experts.3.up_proj.weight in .* has 720 NaN",
        ),
    ],
)
def test_damaged_experts(change, message, parent, tmp_path):
    (tmp_path / "config.json").write_text((parent / "config.json").read_text())
    weights = load_file(parent / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_model(tmp_path).check()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dense": ["mlp"]}, r"per_layer_config\[1\] is dense: its mlp needs an intermediate_size"),
        ({"dense": ["attention"], "intermediate_size": 8}, r"\[1\] is dense: its mlp needs"),
        ({"dense": ["mlp"], "skip": ["mlp"]}, r"\[1\] says two things of one sub-block"),
        ({"intermediate_size": 8}, r"\[1\] has 'intermediate_size', which is not understood"),
        ({"num_experts": 0}, "num_experts 0 is not a whole number above 0"),
        ({"num_experts": 2}, "num_experts_per_tok 3 is more than the 2 to choose from"),
    ],
)
def test_words_of_a_child_that_are_not_understood(entry, message, parent, tmp_path):
    out = export(open_source(parent), tmp_path / "child").out
    config = json.loads((out / "config.json").read_text())
    assert config["per_layer_config"] == {"2": {"dense": ["mlp"], "intermediate_size": 52}}
    (out / "config.json").write_text(json.dumps(config | {"per_layer_config": {"1": entry}}))
    with pytest.raises(UserError, match=message):
        open_model(out)
