"""Our own children: a structure as config.json and back, and words that nobody understands."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.sub_block import MissingFace
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.parents.child import check_said, child, config_of, entry_of, hidden_act, layer_of
from puzzle.parents.opened import open_model
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Structure
from tiny_children import write_tiny_child

GQA = Gqa(hidden_size=24, num_attention_heads=6, num_key_value_heads=6, head_dim=10, norm_eps=1e-5)
FFN = SwiGLU(hidden_size=24, intermediate_size=50, norm_eps=1e-5)
BASE = {"attention": GQA, "ffn": FFN}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}


@st.composite
def children(draw) -> tuple[Structure, dict]:
    """(a child, what its config's global values describe): any parent's fields, and layers that differ where they may."""
    shared = {
        "norm": draw(st.sampled_from(["before", "after", "both"])),
        "norm_offset": draw(st.booleans()),
        "residual_scale": draw(st.sampled_from([1.0, 0.22])),
    }
    o_bias = draw(st.booleans())
    several = draw(st.booleans())
    names = ["full", "local"] if several else ["default"]
    attends = replace(
        GQA,
        **shared,
        window=draw(st.sampled_from([None, 16])),
        o_bias=o_bias,
        qkv_bias=o_bias or draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, "head", "all"])),
        scale=draw(st.sampled_from([None, 0.3])),
        rope=draw(st.sampled_from([*names, None])),
    )
    gated = replace(FFN, **shared, activation=draw(st.sampled_from(["silu", "gelu_tanh"])), bias=draw(st.booleans()))
    linear = Linear(**attends.norm_fields())
    attentions = st.one_of(
        st.just(NO_OP),
        st.just(linear),
        st.just(replace(linear, rank=5)),
        st.builds(
            lambda kv, window, rope: replace(attends, num_key_value_heads=kv, window=window, rope=rope),
            st.sampled_from([1, 2, 3, 6]),
            st.sampled_from([None, 4, 16]),
            st.sampled_from([*names, None]),
        ),
    )
    ffns = st.sampled_from([NO_OP, linear, replace(linear, rank=24), gated, replace(gated, intermediate_size=17)])
    layers = draw(
        st.lists(
            st.builds(lambda one, other: {"attention": one, "ffn": other}, attentions, ffns), min_size=1, max_size=4
        )
    )
    structure = Structure(
        hidden_size=24,
        vocab_size=101,
        max_length=64,
        tied=draw(st.booleans()),
        norm_eps=1e-5,
        norm_offset=shared["norm_offset"],
        embedding_scale=draw(st.sampled_from([1.0, 4.9])),
        logits_divisor=draw(st.sampled_from([1.0, 8.0])),
        ropes={name: Rope(head_dim=10, max_length=64, parameters=PLAIN) for name in names},
        layers=tuple(layers),
    )
    return structure, {"attention": attends, "ffn": gated}


def config_around(structure: Structure, base: dict) -> dict:
    """What an export writes beside `config_of`."""
    return {
        "vocab_size": structure.vocab_size,
        "hidden_size": structure.hidden_size,
        "intermediate_size": base["ffn"].intermediate_size,
        "hidden_act": hidden_act(base["ffn"]),
        "rms_norm_eps": structure.norm_eps,
        "max_position_embeddings": structure.max_length,
        "tie_word_embeddings": structure.tied,
        **config_of(structure, base),
    }


@given(children())
@settings(max_examples=300, deadline=None)
def test_config_round_trip(made):
    structure, base = made
    config = json.loads(json.dumps(config_around(structure, base)))
    assert child(config) == structure
    check_said(config, structure)
    assert set(config["per_layer_config"]) == {
        str(index) for index, layer in enumerate(structure.layers) if layer != base
    }
    PreTrainedConfig.from_dict(config)  # as AutoTokenizer reads it, which runs no code of the child
    assert {word for entry in config["per_layer_config"].values() for word in entry} - {"skip"} <= set(config)


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"num_key_value_head": 2}, r"\[3\] has 'num_key_value_head', .*did you mean 'num_key_value_heads'"),
        ({"experts": 8}, r"\[3\] has 'experts', which is not understood \(known: "),
        ({"hidden_size": 12}, r"\[3\] has 'hidden_size', which is not understood"),
        ({"skip": ["ffn"]}, r"\[3\] names 'ffn', which is none of attention, mlp"),
        ({"linear": ["mixer"]}, r"\[3\] names 'mixer'"),
        ({"skip": ["mlp"], "linear": ["mlp"]}, r"\[3\] says two things of one sub-block"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads '2' is not a whole number above 0"),
        ({"num_key_value_heads": None}, "num_key_value_heads None is not a whole number above 0"),
        ({"intermediate_size": 0}, "intermediate_size 0 is not a whole number above 0"),
        (
            {"linear_rank": {"mlp": 5}},
            r"\[3\].linear_rank = {'mlp': 5} is not understood: it has ranks of what is linear there",
        ),
        ({"linear": ["mlp"], "linear_rank": 5}, r"\[3\].linear_rank = 5 is not understood"),
        ({"linear": ["mlp"], "linear_rank": {"mlp": 0}}, "rank 0 is not a whole number above 0 or none"),
        ({"linear": ["mlp"], "linear_rank": {"mlp": "5"}}, "rank '5' is not a whole number above 0 or none"),
        ({"sliding_window": 7.5}, "window 7.5 is not a whole number above 0 or none"),
    ],
)
def test_an_entry_that_is_not_understood(entry, wanted):
    with pytest.raises(UserError, match=wanted):
        layer_of(entry, BASE, 3)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"per_layer_config": {"2": {}}}, "an entry for layer 2 of 2 layers"),
        ({"norm_placement": "befor"}, "norm_placement 'befor' in config.json: did you mean 'before'"),
        ({"qk_norm": "heads"}, "qk_norm 'heads' in config.json is not understood"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ],
)
def test_a_config_that_is_not_understood(changes, wanted):
    rope = Rope(head_dim=10, max_length=64, parameters=PLAIN)
    structure = Structure(
        hidden_size=24, vocab_size=101, max_length=64, tied=True, norm_eps=1e-5, ropes={"default": rope}, layers=(BASE,) * 2
    )  # fmt: skip
    config = config_around(structure, BASE)
    assert child(config) == structure
    with pytest.raises(UserError, match=wanted):
        child({**config, **changes})


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        ({"ffn": replace(FFN, bias=True)}, "'swiglu' have no bias of its own in per_layer_config"),
        ({"ffn": replace(FFN, norm="after")}, "'swiglu' have no norm of its own"),
        ({"attention": replace(GQA, qk_norm="head")}, "'gqa' have no qk_norm of its own"),
        ({"ffn": GQA}, "'gqa' have no entry in per_layer_config where other layers have 'swiglu'"),
    ],
)
def test_a_difference_that_the_config_has_no_word_for(layer, wanted):
    """An error, never the parent's own sub-block."""
    with pytest.raises(MissingFace, match=wanted):
        entry_of({**BASE, **layer}, BASE)


@pytest.mark.parametrize("layer", [{"ffn": FFN}, {"ffn": FFN, "attention": GQA}, {**BASE, "mixer": FFN}])
def test_slots_that_the_config_has_no_words_for(layer):
    """Left out, in another order, or one more: never read back as the parent's layer."""
    with pytest.raises(UserError, match="has words for attention and then ffn, not for "):
        entry_of(layer, BASE)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"layers": ({**BASE, "ffn": Linear(hidden_size=24)},)}, "layer 0 ffn: .* has no words for 'linear h24'"),
        ({"layers": ({**BASE, "ffn": Linear(hidden_size=24, norm="after", norm_eps=1e-5)},)}, "'linear h24 norm=after eps"),
        ({"norm_offset": True}, "no words for what stands around"),
        ({"norm_eps": 1e-6}, "no words for what stands around"),
        ({"ropes": {"default": Rope(head_dim=12, max_length=64, parameters=PLAIN)}}, "no words for what stands around"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_say_all(changes, wanted):
    """Whoever wrote it: what stands in the config is what the child is."""
    rope = Rope(head_dim=10, max_length=64, parameters=PLAIN)
    fields = {"hidden_size": 24, "vocab_size": 101, "max_length": 64, "tied": True, "norm_eps": 1e-5, "layers": (BASE,)}
    told = Structure(**fields, ropes={"default": rope})
    meant = replace(told, **changes)
    config = config_around(told, BASE) | {"per_layer_config": config_of(meant, BASE)["per_layer_config"]}
    with pytest.raises(UserError, match=wanted):
        check_said(config, meant)


@pytest.mark.parametrize(
    ("tiny", "word", "weight"), [("gpt_oss", "attention_sinks", "sinks"), ("qwen3", "qk_norm", "k_norm.weight")]
)
def test_a_weight_that_the_config_says_nothing_of(tiny, word, weight, tmp_path):
    """Of a word of a later version, or one that was lost: it would be another model without a message."""
    directory = write_tiny_child(tiny, tmp_path / "child")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != word}))
    with pytest.raises(
        UserError,
        match=rf"has the weight model\.layers\.\d\.self_attn\.{weight}, for which its config.json has no place",
    ):
        open_model(directory)
