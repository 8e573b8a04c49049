"""A child's config.json where no code of ours runs: transformers' generic config and AutoTokenizer, both without remote code."""

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer, PretrainedConfig

from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.hf import hf_config
from puzzle.export.sources import child_of_checkpoint
from puzzle.parents.child import child as read_child
from puzzle.parents.child import config_of

GQA = Gqa(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
FFN = SwiGLU(hidden_size=32, intermediate_size=96)
MOE = Moe(hidden_size=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
LINEAR = Linear(hidden_size=32)
MAMBA = Mamba2(hidden_size=32, num_heads=4, head_dim=16, num_groups=1, state_size=8)
DELTA = GatedDelta(hidden_size=32, num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=8)
# {what one layer has in place of `base`: (base's FFN, slot, sub-block, its words, what most layers have of each)}
ONE_LAYER = {
    "linear-ffn": (FFN, "ffn", LINEAR, {"linear": None}),
    "linear-attention": (FFN, "attention", LINEAR, {"linear": None}),
    "low-rank": (FFN, "ffn", replace(LINEAR, rank=8), {"linear": None, "linear_rank": None}),
    "none": (FFN, "ffn", NO_OP, {}),
    "kv": (FFN, "attention", replace(GQA, num_key_value_heads=1), {"num_key_value_heads": 2}),
    "window": (FFN, "attention", replace(GQA, window=4), {"sliding_window": None}),
    "rope": (FFN, "attention", replace(GQA, rope=None), {"rope": "default"}),
    "width": (FFN, "ffn", replace(FFN, intermediate_size=48), {"intermediate_size": 96}),
    "mamba": (FFN, "attention", MAMBA, {"mamba": None}),
    "gated_delta": (FFN, "attention", DELTA, {"gated_delta": None}),
    "experts": (MOE, "ffn", replace(MOE, num_experts=4), {"num_experts": 8}),
    "topk": (MOE, "ffn", replace(MOE, num_experts_per_tok=1), {"num_experts_per_tok": 2}),
    "moe-width": (MOE, "ffn", replace(MOE, moe_intermediate_size=16), {"moe_intermediate_size": 24}),
    "shared": (MOE, "ffn", replace(MOE, shared_intermediate_size=8), {"shared_expert_intermediate_size": None}),
    "latent": (MOE, "ffn", replace(MOE, latent_size=16), {"moe_latent_size": None}),
    "dense": (MOE, "ffn", SwiGLU(hidden_size=32, intermediate_size=40), {"dense": None, "intermediate_size": 48}),
}


@pytest.fixture
def opened(tmp_path, parent):
    """`opened(config)`: transformers' generic config of a directory with it and the parent's tokenizer."""

    def read(config):
        for file in parent.glob("token*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "config.json").write_text(json.dumps(config))
        text = "a b"
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(parent)(text)["input_ids"]
        return PretrainedConfig.from_pretrained(tmp_path)

    return read


@pytest.mark.parametrize("variant", ONE_LAYER)
def test_one_layer_of_another_kind(variant, parent, opened):
    ffn, slot, other, words = ONE_LAYER[variant]
    child = child_of_checkpoint(parent)
    base = {"attention": GQA, "ffn": ffn}
    structure = child.structure.with_layers([base, base | {slot: other}, *[base] * (child.structure.num_layers - 2)])
    config = hf_config(child, child.dtype) | config_of(structure, base)
    assert read_child(config).layers == structure.layers
    entries = config["per_layer_config"]
    assert set(entries) == {"1"}
    assert set(entries["1"]) - {"skip"} == set(words)
    generic = opened(config)
    generic.allow_global_per_layer_attribute_access = True
    assert {word: getattr(generic, word) for word in words} == words
    for index in range(structure.num_layers):  # what each layer has is told too
        own = words | entries.get(str(index), {})
        assert {word: getattr(generic.per_layer_config[index], word) for word in own} == own


def test_nothing_more_where_no_layer_has_it(parent):
    child = child_of_checkpoint(parent)
    assert not {"linear", "dense", "mamba", "gated_delta", "rope"} & set(hf_config(child, child.dtype))
