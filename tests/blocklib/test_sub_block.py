"""A sub-block as a value: its key, its faces, and those that a kind lacks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.blocklib import sub_block as registry
from puzzle.blocklib.fast.batch import make_fast, new_batch
from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.moe import Moe
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.relu2 import Relu2
from puzzle.blocklib.sub_block import (
    MissingFace,
    Normed,
    State,
    SubBlock,
    kinds,
    parse_key,
    register,
)
from puzzle.blocklib.swiglu import SwiGLU

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
OTHERS = ("no", "none", "nan", "inf", "infinity")  # read back as what is no name, and refused
WORDS = st.from_regex(r"[a-z_]+[a-z_0-9]*", fullmatch=True).filter(lambda word: word not in OTHERS)
VALUES = {  # of every field of every kind, by its annotation; by its name where not all words will do
    "int": st.integers(1, 10**6),
    "int | None": st.none() | st.integers(1, 10**6),
    "bool": st.booleans(),
    "float": NUMBERS,
    "float | None": st.none() | NUMBERS,
    "str | None": st.none() | WORDS,
    "norm": st.sampled_from(["before", "after", "both"]),
    "qk_norm": st.sampled_from([None, "head", "all"]),
    "state_dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "activation": st.sampled_from(["silu", "gelu_tanh"]),
    "router": st.sampled_from(["softmax", "sigmoid"]),
}
OURS = {cls.kind: cls for cls in kinds().values()}


@st.composite
def sub_blocks(draw) -> SubBlock:
    cls = OURS[draw(st.sampled_from(sorted(OURS)))]
    values = {f.name: draw(VALUES[f.name if f.name in VALUES else str(f.type)]) for f in fields(cls)}
    if cls is Moe:  # whose numbers go together
        values["num_groups"], values["num_topk_groups"] = draw(st.sampled_from([(1, 1), (4, 2), (4, 4)]))
        values["router"] = "sigmoid" if values["num_groups"] > 1 else values["router"]
        values["num_experts"] = 4 * values["num_experts_per_tok"] * draw(st.integers(1, 9)) + 4
        if values["bias"] or values["activation"] == "swiglu_oai":
            values["shared_intermediate_size"] = values["latent_size"] = None
        values["shared_gate"] = values["shared_gate"] and values["shared_intermediate_size"] is not None
    if cls is GatedDelta:
        values["num_value_heads"] = values["num_key_heads"] * draw(st.integers(1, 9))
    return cls(**values)


def test_the_property_knows_every_field():
    for cls in OURS.values():
        for f in fields(cls):
            assert f.name in VALUES or str(f.type) in VALUES, (cls.kind, f.name)


@given(sub_blocks(), st.randoms())
@settings(max_examples=500, deadline=None)
def test_a_key_is_read_back_in_any_order_of_words(sub_block, chance):
    key = sub_block.key()
    kind, *words = key.split()
    assert kind == sub_block.kind
    assert parse_key(key) == sub_block
    chance.shuffle(words)
    assert parse_key("  ".join([kind, *words])) == sub_block
    assert parse_key(" ".join([kind, *words])).key() == key


@given(sub_blocks(), sub_blocks())
@settings(deadline=None)
def test_equal_keys_are_equal_sub_blocks(one, other):
    assert (one.key() == other.key()) == (one == other)
    assert len({one, other, parse_key(one.key())}) == len({one.key(), other.key()})


@given(sub_blocks())
@settings(deadline=None)
def test_what_is_timed_is_a_sub_block_of_the_same_matrices(sub_block):
    timed = sub_block.timed()
    assert timed.timed() == timed
    assert timed.tensors() == sub_block.tensors()
    assert timed.state() == sub_block.state()
    assert parse_key(timed.key()) == timed


def test_keys_as_people_read_them():
    gqa = Gqa(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    for sub_block, key in (
        (gqa, "gqa h4096 q32 kv8 d128"),
        (
            replace(gqa, window=1024, qkv_bias=True, norm_eps=1e-5),
            "gqa h4096 q32 kv8 d128 window1024 qkv_bias eps=1e-05",
        ),
        (replace(gqa, rope=None, qk_norm="head", scale=0.5), "gqa h4096 q32 kv8 d128 qk_norm=head rope=none scale=0.5"),
        (SwiGLU(hidden_size=4096, intermediate_size=14336, norm="both"), "swiglu h4096 f14336 norm=both"),
        (
            Mamba2(hidden_size=4480, num_heads=128, head_dim=80, num_groups=8, state_size=128, norm_eps=1e-5),
            "mamba2 h4480 heads128 d80 groups8 state128 eps=1e-05",
        ),
        (
            GatedDelta(hidden_size=2048, num_key_heads=16, key_dim=128, num_value_heads=32, value_dim=128),
            "gated_delta h2048 kheads16 k128 vheads32 v128",
        ),
        (Relu2(hidden_size=4480, intermediate_size=15680), "relu2 h4480 f15680"),
        (Linear(hidden_size=4096, residual_scale=0.22), "linear h4096 residual=0.22"),
        (Linear(hidden_size=4096, rank=256), "linear h4096 rank256"),
        (
            Moe(
                hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True
            ),
            "moe h2048 e128 k8 f768 norm_topk",
        ),
        (NO_OP, "none"),
    ):
        assert sub_block.key() == key
        assert parse_key(key) == sub_block


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "kind '' is unknown (known: "),
        ("h4096 f512", "kind 'h4096' is unknown (known: "),
        ("swiglo h256 f512", "kind 'swiglo' is unknown (did you mean 'swiglu'?)"),
        ("GQA h256 q8 kv4 d32", "kind 'GQA' is unknown"),
        ("swiglu h256 f512 biass", "'biass' is no word of kind 'swiglu' (did you mean 'bias'?)"),
        ("gqa h256 q8 kv4 d32 windo16", "'windo16' is no word of kind 'gqa' (did you mean 'window'?)"),
        ("gqa h256 q8 kv4 d32 f512", "'f512' is no word of kind 'gqa'"),
        ("swiglu h256 f512 q8", "'q8' is no word of kind 'swiglu' (known: h, norm, eps, norm_offset, "),
        ("none h256", "'h256' is no word of kind 'none'"),
        ("gqa h256 q8", "lacks kv, d: 'gqa' is not whole without"),
        ("linear", "lacks h: 'linear' is not whole without"),
        ("swiglu h256 f512 f1024", "'f' is given twice"),
        ("swiglu h256 f", "'f' gives f a value that is not a whole number above 0"),
        ("swiglu h256 f0", "'f0' gives f a value that is not a whole number above 0"),
        ("swiglu h256 f-16", "'f-16' is no word of kind 'swiglu' (known: h, norm, "),
        ("swiglu h256 f=1.5", "'f=1.5' gives f a value that is not a whole number above 0"),
        ("swiglu h256 f=none", "'f=none' gives f a value that is not a whole number above 0"),
        ("gqa h256 q8 kv4 d32 window", "'window' gives window a value that is not a whole number above 0 or none"),
        ("moe h256 e8 k2", "lacks f: 'moe' is not whole without"),
        ("swiglu h256 f512 bias2", "'bias2' gives bias a value that is not yes or no"),
        ("swiglu h256 f512 bias=maybe", "'bias=maybe' gives bias a value that is not yes or no"),
        ("swiglu h256 f512 eps=small", "'eps=small' gives eps a value that is not a number"),
        ("swiglu h256 f512 eps=nan", "'eps=nan' gives eps a value that is not a number"),
        ("swiglu h256 f512 act=relu", "'act=relu' gives act a value that is not silu or gelu_tanh"),
        ("swiglu h256 f512 norm=befor", "'norm=befor' gives norm a value that is not before or after or both"),
        ("gqa h256 q8 kv4 d32 qk_norm=heads", "gives qk_norm a value that is not head or all or none"),
        ("gqa h256 q8 kv4 d32 rope=no", "'rope=no' gives rope a value that is not a name or none"),
    ],
)
def test_what_is_no_key(text, wanted):
    with pytest.raises(UserError) as caught:
        parse_key(text)
    message = str(caught.value)
    assert wanted in message
    assert message.startswith(f"sub-block '{text}'")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 0),
        ("num_key_value_heads", "2"),
        ("head_dim", None),
        ("head_dim", 32.0),
        ("window", True),
        ("window", -1),
        ("qkv_bias", 1),
        ("qk_norm", "each"),
        ("norm", "none"),
        ("rope", "none"),
        ("rope", "1e3"),
        ("rope", "two words"),
        ("norm_eps", float("inf")),
        ("scale", "0.5"),
    ],
)
def test_a_value_that_no_field_can_have(field, value):
    """Wherever it comes from (config.json, a family's file): what its key would not give back is refused."""
    whole = parse_key("gqa h256 q8 kv4 d32")
    with pytest.raises(UserError, match=f"sub-block of kind 'gqa': {field} {value!r} is not "):
        replace(whole, **{field: value})


# -- faces ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Bare(SubBlock):
    """A kind that says nothing of itself."""

    kind = "bare"


@dataclass(frozen=True, kw_only=True, slots=True)
class BareNormed(Normed):
    """One that keeps a state and has a module, but no forward of its own."""

    kind = "bare_normed"
    plain = "puzzle.blocklib.plain.part:Part"
    on_kernels = "puzzle.blocklib.fast.batch:Fast"

    def state(self) -> State:
        return State(per_sequence=3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole(BareNormed):
    kind = "whole"

    def inner_tensors(self):
        return {}


X = torch.zeros(1, 2, 4)
BATCH = new_batch(1, 64, {}, "cpu")


@pytest.mark.parametrize(
    ("ask", "kind", "face"),
    [
        (lambda: Bare().tensors(), "bare", "tensors"),
        (lambda: Bare().num_parameters, "bare", "tensors"),
        (lambda: Bare().flops(1, 1), "bare", "tensors"),
        (lambda: Bare().state(), "bare", "state"),
        (lambda: Bare().by_rows, "bare", "state"),
        (lambda: Bare().symbol(NO_OP), "bare", "symbol"),
        (lambda: Bare().module(), "bare", "plain module"),
        (lambda: Bare().fast(None, BATCH), "bare", "path on our kernels"),
        (lambda: Bare().linear_map(None), "bare", "linear map to start from"),
        (lambda: Bare().to_config(NO_OP), "bare", "entry in per_layer_config where other layers have 'none'"),
        (lambda: BareNormed(hidden_size=4).tensors(), "bare_normed", "tensors"),
        (lambda: Whole(hidden_size=4).module()(X, {}), "whole", "plain forward"),
        (lambda: Whole(hidden_size=4).module().new_state(1, 8, X), "whole", "plain decode with state"),
        (lambda: make_fast(Whole(hidden_size=4).module(), BATCH).decode((X[0], None), BATCH), "whole",
         "path on our kernels by rows"),
        (lambda: NO_OP.linear_map(None), "none", "linear map to start from"),
        (lambda: parse_key("swiglu h4 f8").to_config(parse_key("swiglu h4 f8 bias")), "swiglu",
         "bias of its own in per_layer_config"),
        (lambda: parse_key("gqa h4 q2 kv2 d4").to_config(parse_key("gqa h4 q4 kv2 d4")), "gqa",
         "num_attention_heads of its own in per_layer_config"),
    ],
)  # fmt: skip
def test_a_missing_face_is_named(ask, kind, face):
    with pytest.raises(MissingFace, match=f"^sub-blocks of kind '{kind}' have no {face}: use another kind, or add it"):
        ask()


def test_what_says_nothing_offers_nothing():
    """A kind has no stand-ins unless it says so, and nothing replaces what no kind knows but leaving it out."""
    assert Bare.stand_ins(NO_OP) == []
    assert Bare.stand_in(NO_OP, "bare") is None
    assert [variant.name for variant in Bare().replacements()] == ["none"]
    assert Bare().words(NO_OP) == Bare().key() == "bare"


# -- the registry --------------------------------------------------------------------------------------------


def test_two_kinds_of_one_name(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    assert register(Gqa) is Gqa
    with pytest.raises(ValueError, match="two kinds of sub-block are called 'gqa'"):
        register(type("Other", (Bare,), {"kind": "gqa"}))
    assert registry._KINDS["gqa"] is Gqa


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list, registry.size("a")),
        (int, field(default=1)),
        (int, registry.size("h")),
        (int, registry.size("A1")),
        ("int | list", registry.size("a")),
    ],
)
def test_a_field_that_no_key_can_hold(monkeypatch, annotation, value):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    cls = type("Odd", (Normed,), {"kind": "odd", "__annotations__": {"odd": annotation}, "odd": value})
    with pytest.raises(ValueError, match=r"field (odd|hidden_size) of kind 'odd' has no text form"):
        register(dataclass(frozen=True, kw_only=True)(cls))
    assert "odd" not in registry._KINDS
