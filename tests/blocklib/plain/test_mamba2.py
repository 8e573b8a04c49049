"""Mamba-2: chunks against the recurrence in float64, prompts and steps against whole sequences, and heads that are cut."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.mamba2 import Mamba2
from puzzle.blocklib.plain.mamba2 import scan
from puzzle.blocklib.plain.part import blank, loaded
from puzzle.blocklib.sub_block import ParentBlock
from puzzle.blocklib.variant import default_names, variant_of
from random_sub_block import stream, weights

SIZES = Mamba2(hidden_size=20, num_heads=6, head_dim=5, num_groups=3, state_size=7, conv_width=3, chunk_size=8)


@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (7, 8), (8, 8), (33, 8), (50, 16), (9, 1), (5, 128)])
def test_chunks_are_the_recurrence(length, chunk):
    generator = torch.Generator().manual_seed(length)
    x, dt = (torch.randn(2, length, 6, *more, dtype=torch.float64, generator=generator) for more in ((5,), ()))
    b, c = (torch.randn(2, length, 3, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    dt, a = dt.exp(), -torch.linspace(0.01, 16, 6, dtype=torch.float64)
    y, last = scan(x, dt, a, b, c, chunk)
    h = torch.zeros(2, 6, 5, 7, dtype=torch.float64)
    for t in range(length):
        own_b, own_c = (one[:, t].repeat_interleave(2, dim=1) for one in (b, c))
        h = (a * dt[:, t]).exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * own_b[:, :, None]
        assert (y[:, t] - torch.einsum("bnds,bns->bnd", h, own_c)).abs().max() <= 1e-12
    assert (last - h).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "changes", [{}, {"bias": True, "conv_bias": False}, {"norm": "both", "conv_width": 4, "num_groups": 1}]
)
@pytest.mark.parametrize("prompt", [1, 2, 8, 19])
def test_a_prompt_and_steps_are_the_whole_sequence(prompt, changes):
    part, x = loaded(sub_block := replace(SIZES, **changes), weights(replace(SIZES, **changes))), stream(2, 24)
    whole = part.add(x, {})
    state = part.new_state(2, 24, x)
    assert (part.prefill(x[:, :prompt], {}, state) - whole[:, :prompt]).abs().max() <= 1e-12
    for t in range(prompt, 24):
        assert (part.decode(x[:, t : t + 1], {}, state, t) - whole[:, t : t + 1]).abs().max() <= 1e-12
    assert state.num_bytes == 2 * 8 * (state.inputs[0].numel() + state.hidden[0].numel())
    assert sub_block.state().own_bytes == 4 * state.hidden[0].numel()
    assert sub_block.state().per_sequence == state.inputs[0].numel()


def test_what_a_sequence_keeps_does_not_grow():
    """Nemotron-Nano-9B-v2: 5 MiB of recurrent state in float32 whatever the cache's precision, and the convolution's in bf16."""
    state = Mamba2(hidden_size=4480, num_heads=128, head_dim=80, num_groups=8, state_size=128).state()
    for cache in ("bf16", "fp8"):
        assert state.num_bytes(1, cache) == state.num_bytes(10**6, cache, 64) == 5 * 2**20 + 2 * 3 * (10240 + 2048)
    assert state
    assert replace(SIZES, state_dtype="bfloat16").state().own_bytes * 2 == SIZES.state().own_bytes


@pytest.mark.parametrize("changes", [{}, {"bias": True, "norm": "both"}])
def test_shares_add_up(changes):
    """Of whole groups of heads: their contributions, before a norm after, are the whole one's."""
    whole, x = replace(SIZES, num_groups=2, num_heads=8, **changes), stream(2, 19)
    own = weights(whole)
    shares = [loaded(whole.shared(2), whole.cut(own, rank, 2)) for rank in range(2)]
    entered = loaded(whole, own).enter(x)
    added = sum(share.inner(entered, {}) for share in shares)
    assert (added - loaded(whole, own).inner(entered, {})).abs().max() <= 1e-12
    with pytest.raises(UserError, match="`tp` 4: num_groups 2 does not divide by it"):
        whole.shared(4)


def test_it_learns():
    part = blank(SIZES, "cpu").double()
    part.load_state_dict(weights(SIZES))
    part(stream(2, 19), {}).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def block(sub_block) -> ParentBlock:
    own = weights(sub_block)
    part, x = loaded(sub_block, own), stream(2, 40)
    moments = partial(part.moments, [x], {})
    with torch.no_grad():
        return ParentBlock(sub_block=sub_block, weights=own, statistics=part.calibrate([x]), moments=moments)


def test_heads_that_give_nothing_are_cut_exactly():
    """Heads, and channels of every head, that are gated to nothing: without them only the norm is over fewer channels."""
    parent = replace(SIZES, num_groups=1, norm_eps=1e-12)
    for name, silent, kept in (("heads4", [5, 6, 7, 8, 9, 25, 26, 27, 28, 29], 4), ("dim3", [], 6)):
        own = block(parent)
        silent = silent or [5 * head + d for head in range(6) for d in (0, 4)]
        own.weights["out_proj.weight"][:, silent] = 0
        own.weights["in_proj.weight"][silent] = 0  # z = 0, and so is y · silu(z)
        variant = variant_of(parent, name)
        found = variant.initialise(own)
        assert {n: tuple(t.shape) for n, t in found.items()} == variant.sub_block.tensors()
        assert variant.sub_block.num_heads == kept
        x = stream(2, 21)
        ratio = (variant.sub_block.inner_size / parent.inner_size) ** 0.5  # of the norm, over fewer channels
        found = {n: t.double() for n, t in found.items()}
        got = loaded(variant.sub_block, found)(x, {})
        wanted = loaded(parent, own.weights)(x, {})
        assert (got / ratio - wanted).abs().max() <= 1e-5 * wanted.std()


def test_heads_go_from_every_group_alike():
    own = block(SIZES)
    own.weights["out_proj.weight"][:, : 3 * 5] *= 1e-3  # heads 0 to 2: all of the first group, one of the second
    found = variant_of(SIZES, "heads3").initialise(own)
    assert len(found["A_log"]) == 3
    assert found["A_log"][0] in own.weights["A_log"][:2].float()
    assert found["A_log"][1] == own.weights["A_log"][3].float()
    assert found["in_proj.weight"].shape == (3 * 5 * 2 + 2 * 21 + 3, 20)


def test_names_of_variants():
    assert default_names(replace(SIZES, num_heads=24)) == ["heads18", "heads12", "heads6", "linear", "none"]
    assert default_names(SIZES) == ["heads3", "linear", "none"]
    linear = variant_of(SIZES, "linear")
    assert isinstance(linear.sub_block, Linear)
    assert linear.initialise(block(SIZES))["linear.weight"].shape == (20, 20)
    for name, wanted in (
        ("heads4", "give a multiple of 3 and at most 6"),
        ("heads9", "give a multiple of 3"),
        ("dim6", "a head has from 1 to 5 channels"),
        ("mamba2-6x5-g3-s7", "unknown sub-block variant"),
    ):
        with pytest.raises(UserError, match=wanted):
            variant_of(SIZES, name)


def test_in_place_of_attention():
    attention = Gqa(hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=6, rope=None)
    assert "mamba2" not in " ".join(default_names(attention))
    own = ParentBlock(sub_block=attention, weights=weights(attention))
    variant = variant_of(attention, "mamba2-6x5-g3-s7")
    assert variant.sub_block == replace(SIZES, conv_width=4, chunk_size=128)
    torch.manual_seed(0)
    found = variant.initialise(own)
    assert {n: tuple(t.shape) for n, t in found.items()} == variant.sub_block.tensors()
    added = loaded(variant.sub_block, found)(stream(2, 21).float(), {})
    assert 0.03 < added.std() < 30
    with pytest.raises(UserError, match="write Mamba-2 as mamba2-NxD-gG-sS"):
        variant_of(attention, "mamba2")
    with pytest.raises(UserError, match="the heads must divide by the groups"):
        variant_of(attention, "mamba2-6x5-g4-s7")


def test_heads_that_groups_do_not_share_are_refused():
    with pytest.raises(UserError, match="6 heads in 4 groups"):
        blank(replace(SIZES, num_groups=4))
