"""What each variant starts from."""

from __future__ import annotations

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.initialize import channel_order, merge_kv_heads, surgeon
from puzzle.blocklib.moments import RIDGE
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import ParentBlock
from puzzle.blocklib.variant import PARENT, bundles, search_space, variant_of
from puzzle.kernels.block_loss import block_loss


def part_of(block: ParentBlock):
    return loaded(block.sub_block, block.weights)


def started(block: ParentBlock, name: str):
    """The module of a variant as it starts."""
    variant = variant_of(block.sub_block, name)
    return loaded(variant.sub_block, variant.initialise(block))


def test_merged_heads_are_means():
    weight = torch.arange(4 * 2 * 3, dtype=torch.float32).view(8, 3)  # 4 heads of 2
    merged = merge_kv_heads(weight, 4, 2)
    assert torch.equal(merged, torch.cat(((weight[:2] + weight[2:4]) / 2, (weight[4:6] + weight[6:]) / 2)))
    assert torch.equal(merge_kv_heads(weight, 4, 4), weight)


def test_equal_kv_heads_merge_without_loss(make_layer, ropes_of):
    attention = make_layer()["attention"]
    for name in ("k_proj.weight", "v_proj.weight"):
        attention.weights[name] = attention.weights[name][:6].repeat(4, 1)
    x, ropes = torch.randn(2, 17, 24), ropes_of(17)
    expected = started(attention, PARENT)(x, ropes)
    for name in ("kv2", "kv1"):
        torch.testing.assert_close(started(attention, name)(x, ropes), expected)


def test_linear_attention_is_exact_where_attention_is_linear(make_layer, ropes_of):
    """On sequences of one token, softmax attention sees that token alone, and is O · V."""
    attention = make_layer()["attention"]
    part, x = part_of(attention), torch.randn(400, 1, 24)
    attention.moments = lambda: part.moments([x[:300]], ropes_of(1))
    expected = part(x[300:], ropes_of(1))
    assert block_loss(started(attention, "linear")(x[300:], {}), expected) < 1e-6


def test_linear_ffn_is_the_least_squares_solution(make_layer):
    block = make_layer()["ffn"]
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(4, 50, 24, generator=generator) for _ in range(4)]
    ffn = part_of(block)
    block.moments = lambda: ffn.moments(inputs, {})
    x = torch.cat(inputs)
    target = ffn(x, {})
    normed = ffn.norm(x).flatten(0, 1).double()
    best = torch.linalg.lstsq(normed, target.flatten(0, 1).double()).solution
    optimum = block_loss((normed @ best).view_as(x), target)
    mine = block_loss(started(block, "linear")(x, {}), target)
    assert optimum <= mine + 1e-6 <= 1.03 * optimum + 2e-6  # 800 tokens of random noise: λ is no small one
    product = block.weights["down_proj.weight"] @ block.weights["up_proj.weight"]
    assert mine < block_loss(ffn.norm(x) @ product.T, target)
    assert mine < 1


def test_channels_kept_are_those_that_contribute_most(make_layer):
    block = make_layer()["ffn"]
    keep = torch.randperm(63, generator=torch.Generator().manual_seed(5))[:32].sort().values
    dead = torch.tensor([i for i in range(63) if i not in set(keep.tolist())])
    block.weights["down_proj.weight"][:, dead] *= 1e-3
    ffn = part_of(block)
    x = torch.randn(2, 64, 24)
    block.statistics = ffn.calibrate([x])
    assert set(channel_order(block.weights["down_proj.weight"], block.statistics)[:32].tolist()) == set(keep.tolist())
    assert variant_of(block.sub_block, "0.5").sub_block.intermediate_size == 32
    assert block_loss(started(block, "0.5")(x, {}), ffn(x, {})) < 1e-4


def test_second_order_channels_are_a_least_squares_fit(make_layer):
    """On those kept; the first to go is the one whose removal with its best correction costs least, and all are better than as cut."""
    block = make_layer()["ffn"]
    ffn, x = part_of(block), torch.randn(4, 64, 24) @ torch.randn(24, 24)
    block.statistics = ffn.calibrate([x[:2], x[2:]])
    gram, down = block.statistics.channel_gram(), block.weights["down_proj.weight"].double()
    channels = ffn.channels(ffn.enter(x)).flatten(0, 1).double()
    assert torch.allclose(gram, channels.T @ channels)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(63)

    def fit(kept):
        """(columns, and the squared error of the sum)"""
        columns = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ down.T).T
        wrong = down.clone()
        wrong[:, kept] -= columns
        return columns, torch.einsum("hf,fg,hg->", wrong, gram, wrong)

    plain = block.statistics.channel_gram()
    for width in (62, 32):
        kept, columns = surgeon(block.weights["down_proj.weight"], plain, width)
        assert torch.allclose(columns.double(), fit(kept)[0], atol=1e-4)
    without = [torch.tensor([i for i in range(63) if i != j]) for j in range(63)]
    first = surgeon(block.weights["down_proj.weight"], plain, 62)[0]
    assert torch.equal(first, min(without, key=lambda kept: fit(kept)[1]))
    target = ffn(x, {})
    assert block_loss(started(block, "0.5-obs")(x, {}), target) < 0.9 * block_loss(started(block, "0.5")(x, {}), target)


def test_one_size_twice_cannot_be_nested(make_layer):
    space = search_space(make_layer()["ffn"].sub_block, "0.5,0.5-obs,0.25")
    assert [len(names) for names in bundles(space, False)] == [1, 1, 1]
    with pytest.raises(UserError, match=r"`nested` does not take 0\.5 and 0\.5-obs"):
        bundles(space, True)
