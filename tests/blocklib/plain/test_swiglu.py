"""The gated FFN whose first channels are other FFNs: outputs, gradients and weights of the nested ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from puzzle.blocklib.plain.part import blank, loaded
from puzzle.blocklib.sub_block import MissingFace, parse_key
from puzzle.blocklib.variant import bundles, search_space

WIDTHS = (3, 10, 11, 29)


def part_of(more: str, seed: int = 0):
    torch.manual_seed(seed)
    sub_block = parse_key(f"swiglu h17 f{WIDTHS[-1]} {more}")
    weights = {name: 0.3 * torch.randn(shape, dtype=torch.float64) for name, shape in sub_block.tensors().items()}
    part = blank(sub_block, "cpu").double()
    part.load_state_dict(weights)
    return part, [parse_key(f"swiglu h17 f{width} {more}") for width in WIDTHS]


@pytest.mark.parametrize("more", ["", "bias", "act=gelu_tanh norm=both norm_offset", "norm=after bias residual=0.4"])
def test_prefixes_are_the_narrow_ffns(more):
    """Each as its own weights alone compute it, and the gradients those of the sum of their losses."""
    part, sub_blocks = part_of(more)
    x, target = torch.randn(2, 5, 17).double(), torch.randn(2, 5, 17).double()
    outputs = part.prefixes(part.enter(x), {}, sub_blocks)
    for out, sub_block in zip(outputs, sub_blocks, strict=True):
        alone = loaded(sub_block, part.beginning({n: p.detach() for n, p in part.named_parameters()}, sub_block))
        torch.testing.assert_close(out, alone(x, {}), rtol=1e-12, atol=1e-12)
    sum((out - target).square().sum() for out in outputs).backward()
    found = {name: p.grad.clone() for name, p in part.named_parameters()}
    wanted = {name: torch.zeros_like(p) for name, p in part.named_parameters()}
    for sub_block in sub_blocks:
        alone = loaded(sub_block, part.beginning({n: p.detach() for n, p in part.named_parameters()}, sub_block))
        alone.requires_grad_(True)
        (alone(x, {}) - target).square().sum().backward()
        width = sub_block.intermediate_size
        for name, p in alone.named_parameters():
            some = wanted[name]
            if name == "down_proj.weight":
                some = some[:, :width]
            elif name.startswith(("gate_proj", "up_proj")):
                some = some[:width]
            some += p.grad
    close = 1e-4 if "norm_offset" in more else 1e-10  # which multiplies in float32, as Gemma does
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=close, atol=close)


def test_the_gradient_of_a_segment_is_that_of_all_widths_that_have_it():
    """dW_down[segment] = h_segmentᵀ Σ_{w ⊇ segment} g_w."""
    part, sub_blocks = part_of("")
    x = torch.randn(1, 7, 17).double()
    outputs = part.prefixes(part.enter(x), {}, sub_blocks)
    upstream = [torch.randn_like(out) for out in outputs]
    torch.autograd.backward(outputs, upstream)
    channels = part.channels(part.enter(x))
    for index, (start, end) in enumerate(pairwise([0, *WIDTHS])):
        wanted = torch.einsum("bth,btf->hf", sum(upstream[index:]), channels[..., start:end])
        torch.testing.assert_close(part.down_proj.weight.grad[:, start:end], wanted, rtol=1e-10, atol=1e-12)


def test_what_nests():
    parent = parse_key("swiglu h32 f64")
    space = search_space(parent, "0.5,linear,0.25,none,0.75")
    assert bundles(space, nested=True) == [("linear",), ("none",), ("0.25", "0.5", "0.75")]
    assert bundles(space, nested=False) == [("0.5",), ("linear",), ("0.25",), ("none",), ("0.75",)]
    other = parse_key("swiglu h32 f16 act=gelu_tanh")
    assert not other.begins(parent)
    assert not parent.begins(parent)
    attention = search_space(parse_key("gqa h32 q4 kv4 d8"), "kv2,kv1")
    assert bundles(attention, nested=True) == [("kv2",), ("kv1",)]
    linear = blank(parse_key("linear h8"), "cpu")
    with pytest.raises(MissingFace, match="linear"):
        linear.prefixes(torch.randn(1, 1, 8), {}, [linear.sub_block, linear.sub_block])


def test_one_alone_is_the_module():
    part, sub_blocks = part_of("")
    x = torch.randn(1, 3, 17).double()
    (out,) = part.prefixes(part.enter(x), {}, sub_blocks[-1:])
    assert torch.equal(out, part(x, {}))
    assert F.mse_loss(out, part.prefixes(part.enter(x), {}, sub_blocks)[-1]) < 1e-24
