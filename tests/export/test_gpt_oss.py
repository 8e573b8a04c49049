"""Children of gpt-oss: uniform ones in the stock format, the others in ours; what engines take for granted is refused."""

from __future__ import annotations

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
from tiny_parents import YARN, rope, write_tiny_parent

IDS = torch.randint(2, 384, (2, 33), generator=torch.Generator().manual_seed(3))
WHOLE = rope("yarn", **YARN, beta_fast=32.0, beta_slow=1.0, truncate=False)


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return write_tiny_parent("gpt_oss", tmp_path_factory.mktemp("gpt_oss") / "parent", **WHOLE)


def child_of(parent: Path, changes: dict[int, dict[str, str]]) -> Source:
    """changes: {layer: {slot: variant}}, from statistics of random streams."""
    source, opened = open_source(parent), open_model(parent)
    model, layers = load_model(opened), list(source.child.layers)
    for index, chosen in changes.items():
        for slot, name in chosen.items():
            block, part = opened.block(index, slot), getattr(model.blocks[index], slot)
            x = torch.randn(2, 40, 36, generator=torch.Generator().manual_seed(index))
            block.statistics, block.moments = part.calibrate([x]), partial(part.moments, [x], model.ropes(40))
            variant = variant_of(block.sub_block, name, slot)
            layers[index] = layers[index].put(slot, variant.sub_block, partial(dict, variant.initialise(block)))
    return replace(source, child=replace(source.child, layers=tuple(layers)))


def theirs(directory: Path, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def every(**chosen: str) -> dict[int, dict[str, str]]:
    return dict.fromkeys(range(4), chosen)


UNIFORM = {
    "as it is": {},
    "fewer, narrower, fewer a token": every(ffn="experts=4-topk=2-width=16"),
    "merged": every(ffn="merged=3"),
    "fewer KV heads": every(attention="kv1"),
    "shorter windows": {n: {"attention": "window-4"} for n in (0, 2)},
    "two layers fewer": {n: {"attention": "none", "ffn": "none"} for n in (1, 2)},
}


@torch.no_grad()
@pytest.mark.parametrize("case", UNIFORM)
def test_a_uniform_child_is_a_stock_checkpoint(case, parent, tmp_path):
    source = child_of(parent, UNIFORM[case])
    ours, stock = export(source, tmp_path / "ours").out, export(source, tmp_path / "stock", format="gpt-oss").out
    assert not list(stock.glob("*.py"))
    model, wanted = theirs(stock), load_model(ours)(IDS)
    assert type(model).__name__ == "GptOssForCausalLM"
    assert (model(IDS).logits - wanted).abs().max() <= 1e-4
    assert (load_model(stock)(IDS) - wanted).abs().max() <= 1e-5
    again = export(open_source(ours), tmp_path / "again", format="gpt-oss").out
    first, second = (load_file(one / "model.safetensors") for one in (stock, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    if not UNIFORM[case]:
        before, after = (load_file(one / "model.safetensors") for one in (parent, stock))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


OTHERS = {
    "experts": ({1: {"ffn": "experts=4"}}, {}, "layer 1 ffn: `format` gpt-oss .* num_experts 4 beside 5"),
    "a token's experts": ({3: {"ffn": "topk=1"}}, {}, "layer 3 ffn: .* num_experts_per_tok 1 beside 3"),
    "no FFN": ({1: {"ffn": "none"}}, {}, "layer 1 ffn: `format` gpt-oss has no place for 'none'"),
    "no attention": ({2: {"attention": "none"}}, {}, "layer 2 attention: .* no place for 'none'"),
    "KV heads": ({2: {"attention": "kv1"}}, {}, "layer 2 attention: .* num_key_value_heads 1 beside 2"),
    "a shorter window": ({2: {"attention": "window-4"}}, {}, "layer 2 attention: .* window 4 beside 7"),
    "a window more": ({1: {"attention": "window-7"}}, {}, "with windows in layers 0, 2, 4 … and no others whatever"),
    "a layer fewer": ({1: {"attention": "none", "ffn": "none"}}, {}, "with windows in layers 0, 2, 4 … and no others"),
    "no mixture": (every(ffn="none"), {}, "has no mixture of experts"),
    "rope": ({}, rope("default"), "with a RoPE of type yarn with beta_fast, beta_slow, factor"),
    "rope's factor": ({}, rope("yarn", **YARN, beta_fast=32.0, beta_slow=1.0, attention_factor=1.1), "with a RoPE of type yarn"),
    "length": ({}, {"max_position_embeddings": 129}, "with tables of factor · original_max_position_embeddings positions"),
    "epsilon": ({}, {"rms_norm_eps": 1e-6}, "engines know `format` gpt-oss with rms_norm_eps 1e-05 whatever its config says"),
    "no biases": ({}, {"attention_bias": False}, "with biases in attention"),
    "tied": ({}, {"tie_word_embeddings": True}, "with a head of its own"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", OTHERS)
def test_others_are_refused_by_name_and_written_as_hf(case, parent, tmp_path, refused_but_written_as_hf):
    changes, sizes, message = OTHERS[case]
    parent = write_tiny_parent("gpt_oss", tmp_path / "parent", **WHOLE | sizes) if sizes else parent
    source = child_of(parent, changes)
    refused_but_written_as_hf(source, "gpt-oss", message, IDS)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("qwen3-moe", "hidden_act .swiglu_oai. is not supported; .*: write `format` hf"),
        ("granitemoehybrid", "has experts without a shared one"),
        ("nemotron-h", "layer 0 attention: Nemotron-H has no attention with rotary positions"),
        ("nemotron-nas", r"layer 0 attention: .* has no attention sinks \(gpt-oss\)"),
        ("gguf", r"layer 0 attention: llama.cpp has no attention sinks \(gpt-oss\)"),
    ],
)
def test_no_other_format_holds_it(format, message, tmp_path):
    parent = write_tiny_parent(
        "gpt_oss", tmp_path / "parent", layer_types=["full_attention"] * 4, sliding_window=9, head_dim=6
    )
    with pytest.raises(UserError, match=message):
        export(open_source(parent), tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_engines_are_told_of_the_stock_format(parent, tmp_path):
    with pytest.raises(UserError, match=r"vllm has no attention sinks .*: write `format` gpt-oss, if all"):
        export(open_source(parent), tmp_path / "child", engine="vllm")
    assert export(open_source(parent), tmp_path / "child", engine="vllm", format="gpt-oss").engine == "vllm"
    with pytest.raises(UserError, match="`kv_dtype` fp8: `format` gpt-oss has no scales of a cache here"):
        export(open_source(parent), tmp_path / "fp8", format="gpt-oss", kv_dtype="fp8", data=["x"])
    with pytest.raises(UserError, match="`dtype` fp8 with `format` gpt-oss"):
        export(open_source(parent), tmp_path / "other", format="gpt-oss", dtype="fp8")
    with pytest.raises(UserError, match=r"sub-blocks of kind 'moe' have no form in fp8"):
        export(open_source(parent), tmp_path / "other", dtype="fp8")
