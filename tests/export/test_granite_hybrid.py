"""Llamas with Mamba-2 in place of some attentions, and Granite-4's own children, as a stock GraniteMoeHybridForCausalLM."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from puzzle.base.errors import UserError
from puzzle.blocklib.variant import variant_of
from puzzle.export.write import Source, export, open_source
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from tiny_parents import write_tiny_parent

IDS = torch.randint(2, 384, (2, 33), generator=torch.Generator().manual_seed(3))
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1, "max_new_tokens": 9}
MAMBA = {"attention": "mamba2-6x12-g1-s16"}
GRANITE = "granitemoehybrid, Mamba-2 and dense FFNs"


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("parents"), {}

    def opened(name: str) -> Path:
        if name not in made:
            made[name] = write_tiny_parent(name, root / str(len(made)))
        return made[name]

    return opened


def child_of(parent: Path, changes: dict[int, dict[str, str]]) -> Source:
    torch.manual_seed(5)
    source, opened = open_source(parent), open_model(parent)
    model, layers = load_model(opened), list(source.child.layers)
    for index, chosen in changes.items():
        for slot, name in chosen.items():
            block = opened.block(index, slot)
            part, x = getattr(model.blocks[index], slot), torch.randn(2, 40, 36)
            block.statistics, block.moments = part.calibrate([x]), partial(part.moments, [x], model.ropes(40))
            variant = variant_of(block.sub_block, name, slot)
            layers[index] = layers[index].put(slot, variant.sub_block, partial(dict, variant.initialise(block)))
    return replace(source, child=replace(source.child, layers=tuple(layers)))


SAYABLE = {
    "a Llama with Mamba-2": ("llama", {0: MAMBA, 2: MAMBA}),
    "all FFNs narrower": ("llama", {n: {"ffn": "0.5"} | (MAMBA if n == 1 else {}) for n in range(4)}),
    "a Llama as it is": ("llama", {}),
    "an empty layer": ("llama", {1: {"attention": "none", "ffn": "none"}, 3: MAMBA}),
    "Granite-4": (GRANITE, {}),
    "Granite-4 with experts": ("granitemoehybrid, attention alone", {2: MAMBA, 3: MAMBA}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", SAYABLE)
def test_a_child_is_a_stock_checkpoint(case, parents, tmp_path):
    name, changes = SAYABLE[case]
    source = child_of(parents(name), changes)
    ours = export(source, tmp_path / "ours").out
    stock = export(source, tmp_path / "stock", format="granitemoehybrid").out
    assert not list(stock.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32).eval()
    assert type(model).__name__ == "GraniteMoeHybridForCausalLM"
    wanted = load_model(ours)(IDS)
    assert (model(IDS, use_cache=False).logits - wanted).abs().max() <= 1e-4
    assert (load_model(stock)(IDS) - wanted).abs().max() <= 1e-5
    if "mamba" in json.loads((stock / "config.json").read_text())["layer_types"]:
        assert "--mamba-ssm-cache-dtype float32" in (stock / "README.md").read_text()
        theirs = AutoModelForCausalLM.from_pretrained(ours, trust_remote_code=True, dtype=torch.float32)
        assert torch.equal(model.generate(IDS, **GREEDY), theirs.generate(IDS, **GREEDY))
    if case == "Granite-4":
        assert load_file(stock / "model.safetensors").keys() == load_file(parents(name) / "model.safetensors").keys()


OTHERS = {
    "a width": ({0: MAMBA, 1: {"ffn": "0.5"}}, "layer 1 ffn: `format` granitemoehybrid has one .* intermediate_size"),
    "no FFN": ({0: MAMBA, 1: {"ffn": "none"}}, "layer 1 ffn: .* has no place for 'none'"),
    "no attention": ({0: MAMBA, 1: {"attention": "none"}}, "layer 1 attention: .* has no place for 'none'"),
    "KV heads": ({0: MAMBA, 1: {"attention": "kv1"}}, "layer 1 attention: .* num_key_value_heads 1 beside 2"),
    "a window": ({0: MAMBA, 1: {"attention": "window-4"}}, "layer 1 attention: .* window 4 beside None"),
    "a matrix": ({0: MAMBA, 1: {"attention": "linear"}}, "layer 1 attention: .* no place for 'linear h36'"),
    "another state": ({0: MAMBA, 1: MAMBA, 2: {"attention": "mamba2-6x12-g1-s8"}}, "layer 2 attention: .* state_size 8 beside 16"),
    "no attention at all": (dict.fromkeys(range(4), MAMBA), "has no attention, which"),
    "groups": ({0: {"attention": "mamba2-6x12-g2-s16"}}, "in 2 groups is another model to some readers .*: write it for `engine` vllm"),
    "odd inner size": ({0: {"attention": "mamba2-6x7-g1-s8"}}, "whole multiples of hidden_size 36 channels, and .* has 6 heads of 7"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_uniform_is_refused_by_name(case, parents, tmp_path):
    changes, message = OTHERS[case]
    with pytest.raises(UserError, match=message) as caught:
        export(child_of(parents("llama"), changes), tmp_path / "stock", format="granitemoehybrid")
    assert "\n" not in str(caught.value)
    assert "`format` hf" in str(caught.value)
    assert not (tmp_path / "stock").exists()


def test_engines_are_told_of_it(parents, tmp_path):
    source = child_of(parents("llama"), {0: MAMBA})
    with pytest.raises(
        UserError, match=r"vllm has no sub-blocks of kind 'mamba2': write `format` granitemoehybrid, if"
    ):
        export(source, tmp_path / "child", engine="vllm")
    for engine in ("vllm", "mlx", "sglang"):
        assert export(source, tmp_path / engine, engine=engine, format="granitemoehybrid").engine == engine
    groups = child_of(parents("llama"), {0: {"attention": "mamba2-6x12-g2-s16"}})  # each is normed by itself there
    assert export(groups, tmp_path / "groups", engine="vllm", format="granitemoehybrid").lowerings == ()
    with pytest.raises(UserError, match=r"`engine` llama\.cpp does not read `format` granitemoehybrid"):
        export(source, tmp_path / "other", engine="llama.cpp", format="granitemoehybrid")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["mamba", "sliding_attention", "mamba", "attention"]},
            r"layer_types\[1\] = 'sliding_attention' in config.json is not",
        ),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit = .* steps of time without limits"),
        (
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' in config.json is not supported for Mamba-2|hidden_act 'gelu' is not",
        ),
    ],
)
def test_a_parent_that_is_not_understood(changes, message, parents, tmp_path):
    config = json.loads((parents(GRANITE) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").symlink_to(parents(GRANITE) / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_model(tmp_path)
