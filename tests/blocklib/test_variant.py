"""One contract over all kinds, the names of variants, and the search spaces that they make."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.plain.part import blank, loaded
from puzzle.blocklib.sub_block import ParentBlock, Variant, kinds
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.blocklib.variant import PARENT, default_names, search_space, search_spaces, variant_of
from puzzle.parents.child import entry_of, layer_of

LAYERS = {
    "llama": {},
    "qwen3": {"qk_norm": "head"},
    "qwen2": {"qkv_bias": True},
    "biased": {"qkv_bias": True, "o_bias": True, "bias": True},
    "windowed": {"window": 16},
    "olmo2": {"qk_norm": "all", "norm": "after"},
    "gemma3": {"qk_norm": "head", "norm": "both", "norm_offset": True, "activation": "gelu_tanh", "scale": 0.3},
    "granite": {"residual_scale": 0.22, "scale": 0.1},
    "smollm3": {"rope": None},
}


@pytest.fixture(params=LAYERS, scope="module")
def layer(request, make_layer) -> dict[str, ParentBlock]:
    return make_layer(**LAYERS[request.param])


def every_variant(block: ParentBlock, slot: str) -> list[Variant]:
    """By default and by name."""
    names = [*search_space(block.sub_block, None, slot), "linear-5", "linear-24", "linear-5-svd"]
    return [variant_of(block.sub_block, name, slot) for name in names]


def built(variant: Variant, block: ParentBlock):
    """Its module as training starts it."""
    module = blank(variant.sub_block, "cpu").float()
    module.load_state_dict(variant.initialise(block))
    return module


def test_contract(layer, ropes_of):
    """Sizes = the tensors' own count, gradient flows, save/load keeps every bit, the exported entry rebuilds it."""
    x, ropes = torch.randn(2, 33, 24), ropes_of(33)
    base = {slot: block.sub_block for slot, block in layer.items()}
    for slot, block in layer.items():
        for variant in every_variant(block, slot):
            module, sub_block = built(variant, block), variant.sub_block
            parameters = dict(module.named_parameters())
            assert {n: tuple(p.shape) for n, p in parameters.items()} == sub_block.tensors(), variant.name
            assert sum(p.numel() for p in parameters.values()) == sub_block.num_parameters, variant.name
            out = module(x, ropes)
            assert out.shape == x.shape
            assert torch.isfinite(out).all()
            if parameters:
                out.square().sum().backward()
                assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values()), variant.name
            again = layer_of(entry_of({**base, slot: sub_block}, base), base, 0)
            assert again == {**base, slot: sub_block}
            assert torch.equal(loaded(again[slot], module.state_dict())(x, ropes), out)
            keys = getattr(module, "k_proj", None)
            assert sub_block.state().per_token == (2 * keys.out_features if keys is not None else 0)
            assert sub_block.state().per_sequence == 0


def test_full_size_is_the_parent(layer, ropes_of):
    x, ropes = torch.randn(2, 33, 24), ropes_of(33)
    for slot, whole in (("attention", "kv4"), ("ffn", "1.0")):
        block = layer[slot]
        expected = loaded(block.sub_block, block.weights)(x, ropes)
        for name in (PARENT, whole):
            variant = variant_of(block.sub_block, name, slot)
            assert variant.sub_block == block.sub_block
            assert torch.equal(built(variant, block)(x, ropes), expected)
        assert search_space(block.sub_block, f"{whole},{PARENT}", slot) == {PARENT: block.sub_block}


def test_names_are_unambiguous(layer):
    for block in layer.values():
        names = default_names(block.sub_block)
        assert len(names) == len(set(names))
        for name in names:
            assert sum(kind.stand_in(block.sub_block, name) is not None for kind in kinds().values()) == 1, name


@pytest.mark.parametrize(
    ("heads", "fewer"),
    [(1, []), (2, [1]), (3, [1]), (7, [1]), (8, [4, 2, 1]), (10, [5, 2, 1]), (12, [6, 3, 1]), (32, [16, 8, 4, 2, 1])],
)
def test_fewer_kv_heads_fit_the_parent(heads, fewer):
    """Halves down to one; where the heads do not halve, the next divisor below."""
    names = Gqa.stand_ins(Gqa(hidden_size=32, num_attention_heads=heads, num_key_value_heads=heads, head_dim=4))
    assert names == [*(f"kv{count}" for count in fewer), "window-128"]


def test_replacements_are_what_is_offered_by_default(layer):
    for slot, block in layer.items():
        offered = [(v.name, v.sub_block) for v in block.sub_block.replacements()]
        assert offered == [(n, b) for n, b in search_space(block.sub_block, None, slot).items() if n != PARENT]


@given(st.floats(0.001, 1), st.sampled_from([63, 96, 704, 2816, 5632, 14336]))
@settings(max_examples=200, deadline=None)
def test_widths(fraction, inner):
    narrow = variant_of(SwiGLU(hidden_size=24, intermediate_size=inner), f"{fraction}").sub_block
    width = narrow.intermediate_size
    step = 256 if inner >= 4096 else 16
    assert 1 <= width <= inner
    assert width == inner or width % step == 0
    assert abs(width - fraction * inner) <= step


@pytest.mark.parametrize(
    ("slot", "text", "wanted"),
    [
        ("attention", "kv3", "divisor of 4"),
        ("attention", "kvv2", "unknown attention variant 'kvv2': did you mean 'kv2'"),
        ("attention", "window-0", "at least 1"),
        ("attention", "linear-0", "variant 'linear-0': a rank is a whole number from 1 to the hidden size 24"),
        ("ffn", "linear-25", "variant 'linear-25': a rank is a whole number from 1 to the hidden size 24"),
        ("ffn", "linear-half", "variant 'linear-half': a rank is a whole number"),
        ("ffn", "linear-5.5", "variant 'linear-5.5': a rank is a whole number"),
        ("ffn", "linear--5", "variant 'linear--5': a rank is a whole number"),
        ("ffn", "linear-", "variant 'linear-': a rank is a whole number"),
        ("attention", "linear-5-obs", "variant 'linear-5-obs': a rank is a whole number"),
        ("ffn", "1.5", "above 0 and at most 1"),
        ("ffn", "0", "above 0"),
        ("ffn", "-0.5", "above 0"),
        ("ffn", "nan", "above 0"),
        ("ffn", "linaer", "unknown ffn variant 'linaer': did you mean 'linear'"),
    ],
)
def test_bad_names(make_layer, slot, text, wanted):
    with pytest.raises(UserError, match=wanted):
        variant_of(make_layer()[slot].sub_block, text, slot)


# -- layers that are not alike -------------------------------------------------------------------------------

ATTENTIONS = st.builds(
    lambda kv, groups, window: Gqa(
        hidden_size=32, num_attention_heads=kv * groups, num_key_value_heads=kv, head_dim=4, window=window
    ),
    st.integers(1, 12),
    st.integers(1, 4),
    st.none() | st.integers(1, 300),
)
FFNS = st.builds(lambda width: SwiGLU(hidden_size=32, intermediate_size=width), st.integers(1, 300))
PLACES = {"attention": ATTENTIONS, "ffn": FFNS}
ASKED = st.lists(
    st.sampled_from(["none", "linear", "parent", "0.5", "0.25", "kv1", "kv2", "kv3", "kv4", "window-2", "window-128"]),
    min_size=1,
    unique=True,
)


def takes(parent, name: str) -> bool:
    """Written down once more, by what the names mean."""
    if name in ("none", "linear", "parent"):
        return True
    if isinstance(parent, SwiGLU):
        return name in ("0.5", "0.25")
    if name.startswith("kv"):
        return parent.num_key_value_heads % int(name[2:]) == 0
    return name.startswith("window-") and (parent.window is None or int(name[7:]) <= parent.window)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_spaces_leave_out_what_a_layer_cannot_take(data):
    """A name stands in exactly the layers that can take it; one that none can take is an error that names it."""
    slot = data.draw(st.sampled_from(list(PLACES)))
    parents = dict(enumerate(data.draw(st.lists(PLACES[slot], min_size=1, max_size=5))))
    names = data.draw(ASKED)
    layers = {index: {slot: parent} for index, parent in parents.items()}
    nowhere = [name for name in names if not any(takes(parent, name) for parent in parents.values())]
    if nowhere:
        with pytest.raises(UserError, match=f"variant '{nowhere[0]}'"):
            search_spaces(layers, {slot: ",".join(names)})
        return
    spaces = search_spaces(layers, {slot: ",".join(names)})
    assert list(spaces) == list(layers)
    for index, parent in parents.items():
        space = spaces[index][slot]
        assert next(iter(space.items())) == (PARENT, parent)
        own = {name: variant_of(parent, name).sub_block for name in names if takes(parent, name)}
        assert space == {PARENT: parent} | {name: sub_block for name, sub_block in own.items() if sub_block != parent}


def test_spaces_of_layers_with_other_slots():
    """A slot that only some layers have is asked for there alone; slots that nobody named take their defaults."""
    ffn = SwiGLU(hidden_size=32, intermediate_size=64)
    spaces = search_spaces({2: {"mixer": ffn}, 5: {"ffn": ffn, "mixer": ffn}}, {"ffn": "0.5", "mixer": None})
    assert {index: list(slots) for index, slots in spaces.items()} == {2: ["mixer"], 5: ["ffn", "mixer"]}
    assert list(spaces[5]["ffn"]) == [PARENT, "0.5"]
    assert spaces[2]["mixer"] == spaces[5]["mixer"] == search_space(ffn, None)
