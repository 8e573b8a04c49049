"""One contract over the whole registry, and what each variant starts from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.base.errors import UserError
from puzzle.blocklib.distill import calibrate
from puzzle.blocklib.initialize import attention_as_linear, channel_order, merge_kv_heads
from puzzle.blocklib.layer import KINDS, LayerSpec, ParentLayer, attention_shapes, ffn_shapes, rope_tables
from puzzle.blocklib.variant import PARENT, parse_variant, registry, search_space
from puzzle.kernels.block_loss import block_loss
from puzzle.runtime.model import module_from_hf, parent_module


def make_layer(**changes) -> ParentLayer:
    values = {
        "hidden_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "intermediate_size": 63,
        "rms_norm_eps": 1e-5,
        "inv_freq": (1.0, 0.3, 0.05),
    }
    spec = LayerSpec(**values | changes)
    generator = torch.Generator().manual_seed(1)
    weights = [
        {n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes(spec).items()}
        for shapes in (attention_shapes, ffn_shapes)
    ]
    layer = ParentLayer(index=0, spec=spec, attention=weights[0], ffn=weights[1])
    x = torch.randn(3, 40, spec.hidden_size, generator=generator)
    layer.calibration = calibrate(parent_module("ffn", spec, weights[1]), [x], spec)
    return layer


SPECS = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "qwen2": {"qkv_bias": True},
    "biased": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "windowed": {"window": 16},
}


@pytest.fixture(params=SPECS, scope="module")
def layer(request) -> ParentLayer:
    return make_layer(**SPECS[request.param])


def every_variant(spec):
    space = search_space(spec, None, None)
    return [(kind, name, parse_variant(kind, name, spec)) for kind in KINDS for name in space[kind]]


def test_contract(layer):
    """Footprint = the tensors' own count, gradient flows, save/load keeps every bit, the exported entry rebuilds it."""
    spec = layer.spec
    x, rope = torch.randn(2, 33, spec.hidden_size), rope_tables(spec, 33)
    for kind, name, variant in every_variant(spec):
        module = variant.build(layer)
        parameters = list(module.parameters())
        footprint = variant.footprint(spec)
        assert sum(p.numel() for p in parameters) == footprint.num_parameters, (kind, name)
        out = module(x, rope)
        assert out.shape == x.shape
        assert torch.isfinite(out).all()
        if parameters:
            out.square().sum().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters), (kind, name)
        again = module_from_hf(kind, variant.to_hf(spec), spec)
        again.load_state_dict(module.state_dict())
        assert torch.equal(again(x, rope), out)
        keys = getattr(module, "k_proj", None)
        assert footprint.kv_elements_per_token == (2 * keys.out_features if keys is not None else 0)


def test_full_size_is_the_parent(layer):
    x, rope = torch.randn(2, 33, layer.spec.hidden_size), rope_tables(layer.spec, 33)
    for kind in KINDS:
        variant = parse_variant(kind, PARENT, layer.spec)
        assert variant.matches_parent(layer.spec)
        expected = parent_module(kind, layer.spec, layer.weights(kind))(x, rope)
        assert torch.equal(variant.build(layer)(x, rope), expected)


def test_registry_names_are_unambiguous():
    spec = make_layer().spec
    for kind, classes in registry().items():
        names = [n for cls in classes for n in cls.candidates(spec)]
        assert len(names) == len(set(names))
        for name in names:
            assert sum(cls.parse(name) is not None for cls in classes) == 1, (kind, name)


def test_merged_heads_are_means():
    weight = torch.arange(4 * 2 * 3, dtype=torch.float32).view(8, 3)  # 4 heads of 2
    merged = merge_kv_heads(weight, 4, 2)
    assert torch.equal(merged, torch.cat(((weight[:2] + weight[2:4]) / 2, (weight[4:6] + weight[6:]) / 2)))
    assert torch.equal(merge_kv_heads(weight, 4, 4), weight)


def test_equal_kv_heads_merge_without_loss():
    layer = make_layer()
    dim = layer.spec.head_dim
    for name in ("k_proj.weight", "v_proj.weight"):
        layer.attention[name] = layer.attention[name][:dim].repeat(4, 1)
    x, rope = torch.randn(2, 17, 24), rope_tables(layer.spec, 17)
    expected = parse_variant("attention", PARENT, layer.spec).build(layer)(x, rope)
    for name in ("kv2", "kv1"):
        torch.testing.assert_close(parse_variant("attention", name, layer.spec).build(layer)(x, rope), expected)


def test_linear_attention_is_attention_to_oneself():
    """On sequences of one token, softmax attention sees that token alone: O · V is exact."""
    layer = make_layer()
    module = parse_variant("attention", "linear", layer.spec).build(layer)
    x = torch.randn(5, 1, 24)
    expected = parent_module("attention", layer.spec, layer.attention)(x, rope_tables(layer.spec, 1))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert attention_as_linear(layer.attention, layer.spec).shape == (24, 24)


def test_linear_ffn_is_the_least_squares_solution():
    layer = make_layer()
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(4, 50, 24, generator=generator) for _ in range(4)]
    ffn = parent_module("ffn", layer.spec, layer.ffn)
    layer.calibration = calibrate(ffn, inputs, layer.spec)
    module = parse_variant("ffn", "linear", layer.spec).build(layer)
    x = torch.cat(inputs)
    normed = ffn.norm(x).flatten(0, 1).double()
    best = torch.linalg.lstsq(normed, ffn(x).flatten(0, 1).double()).solution
    optimum = block_loss((normed @ best).view_as(x), ffn(x))
    assert optimum <= block_loss(module(x), ffn(x)) + 1e-6 <= 1.01 * optimum + 2e-6
    product = layer.ffn["down_proj.weight"] @ layer.ffn["up_proj.weight"]
    mine = block_loss(module(x), ffn(x))
    assert mine < block_loss(ffn.norm(x) @ product.T, ffn(x))
    assert mine < 1


def test_channels_kept_are_those_that_contribute_most():
    layer = make_layer()
    inner = layer.spec.intermediate_size
    keep = torch.randperm(inner, generator=torch.Generator().manual_seed(5))[:32].sort().values
    dead = torch.tensor([i for i in range(inner) if i not in set(keep.tolist())])
    layer.ffn["down_proj.weight"][:, dead] *= 1e-3
    ffn = parent_module("ffn", layer.spec, layer.ffn)
    x = torch.randn(2, 64, 24)
    layer.calibration = calibrate(ffn, [x], layer.spec)
    assert set(channel_order(layer.ffn, layer.calibration)[:32].tolist()) == set(keep.tolist())
    narrow = parse_variant("ffn", "0.5", layer.spec)
    assert narrow.width(layer.spec) == 32
    assert block_loss(narrow.build(layer)(x), ffn(x)) < 1e-4


@given(st.floats(0.001, 1), st.sampled_from([63, 96, 704, 2816, 5632, 14336]))
@settings(max_examples=200, deadline=None)
def test_widths(fraction, inner):
    spec = make_layer().spec
    spec = LayerSpec(**{f: getattr(spec, f) for f in spec.__slots__} | {"intermediate_size": inner})
    width = parse_variant("ffn", f"{fraction}", spec).width(spec)
    step = 256 if inner >= 4096 else 16
    assert 1 <= width <= inner
    assert width == inner or width % step == 0
    assert abs(width - fraction * inner) <= step


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        ("attention", "kv3", "divisor of 4"),
        ("attention", "kvv2", "did you mean 'kv2'"),
        ("attention", "window-0", "at least 1"),
        ("ffn", "1.5", "above 0 and at most 1"),
        ("ffn", "0", "above 0"),
        ("ffn", "-0.5", "above 0"),
        ("ffn", "nan", "above 0"),
        ("ffn", "linaer", "did you mean 'linear'"),
    ],
)
def test_bad_names(kind, text, wanted):
    with pytest.raises(UserError, match=wanted):
        parse_variant(kind, text, make_layer().spec)
