"""Gated DeltaNet: chunks against the recurrence and against transformers' layer, prompts and steps against whole sequences, its start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from puzzle.base.errors import UserError
from puzzle.blocklib.gated_delta import GatedDelta
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.plain.gated_delta import scan
from puzzle.blocklib.plain.part import blank, loaded
from puzzle.blocklib.sub_block import MissingFace, ParentBlock
from puzzle.blocklib.variant import default_names, variant_of
from random_sub_block import stream, weights

SIZES = GatedDelta(
    hidden_size=20, num_key_heads=2, key_dim=5, num_value_heads=6, value_dim=7, conv_width=3, chunk_size=8
)


def rule_inputs(length: int) -> list[torch.Tensor]:
    """q, k (of length 1), v, beta, logs: decays from nearly 1 to nearly 0."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, 6, d, dtype=torch.float64, generator=generator) for d in (5, 5, 7))
    beta, logs = (torch.rand(2, length, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    return [q, k / k.norm(dim=-1, keepdim=True), v, beta, -20 * logs**4]


def recurrence(q, k, v, beta, logs) -> tuple[torch.Tensor, torch.Tensor]:
    h, found = torch.zeros(2, 6, 5, 7, dtype=torch.float64), []
    for t in range(q.shape[1]):
        h = logs[:, t, :, None, None].exp() * h
        new = beta[:, t, :, None] * (v[:, t] - torch.einsum("bnkv,bnk->bnv", h, k[:, t]))
        h = h + torch.einsum("bnk,bnv->bnkv", k[:, t], new)
        found.append(torch.einsum("bnkv,bnk->bnv", h, q[:, t]))
    return torch.stack(found, dim=1), h


@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (7, 8), (8, 8), (33, 8), (50, 16), (9, 1), (5, 128)])
def test_chunks_and_their_gradients_are_the_recurrence(length, chunk):
    one, other = ([t.clone().requires_grad_() for t in rule_inputs(length)] for _ in range(2))
    (y, last), (wanted, h) = scan(*one, chunk), recurrence(*other)
    assert (y - wanted).abs().max() <= 1e-12
    assert (last - h).abs().max() <= 1e-12
    for found, state in ((y, last), (wanted, h)):
        (found.square().sum() + state.square().sum()).backward()
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-11 * (1 + theirs.grad.abs().max())


def qwen(sub_block: GatedDelta, own: dict[str, torch.Tensor]) -> Qwen3NextGatedDeltaNet:
    """transformers' layer with these weights, whose rows it has by key head."""
    config = Qwen3NextConfig(
        hidden_size=sub_block.hidden_size, linear_num_key_heads=sub_block.num_key_heads, linear_key_head_dim=sub_block.key_dim,
        linear_num_value_heads=sub_block.num_value_heads, linear_value_head_dim=sub_block.value_dim,
        linear_conv_kernel_dim=sub_block.conv_width, rms_norm_eps=sub_block.norm_eps, hidden_act="silu",
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    layer = Qwen3NextGatedDeltaNet(config, 0).float()
    z, q, k, v, b, a = (
        t.unflatten(0, (sub_block.num_key_heads, -1)) for t in own["in_proj.weight"].split(sub_block.parts()["in_proj"])
    )
    names = ("conv1d.weight", "dt_bias", "A_log", "out_proj.weight")
    renamed = {n: own[n] for n in names} | {"norm.weight": own["gate_norm.weight"]}
    renamed["in_proj_qkvz.weight"] = torch.cat((q, k, v, z), dim=1).flatten(0, 1)
    renamed["in_proj_ba.weight"] = torch.cat((b, a), dim=1).flatten(0, 1)
    layer.load_state_dict(renamed)
    return layer.eval()


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 65, 130])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_heads": 6, "conv_width": 4}, {"num_key_heads": 1, "num_value_heads": 1, "norm_eps": 1e-5}]
)
def test_it_is_transformers_layer(changes, length):
    """In float32: whole sequences, and a prompt with cached steps after it."""
    sub_block = replace(SIZES, chunk_size=64, **changes)
    own = weights(sub_block, dtype=torch.float32)
    part, layer, entered = loaded(sub_block, own), qwen(sub_block, own), stream(2, length + 3).float()
    wanted = layer(entered)
    assert (part.inner(entered, {}) - wanted).norm() <= 1e-5 * wanted.norm()
    cache, state = DynamicCache(config=Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])), None
    state = part.new_state(2, length + 3, entered)
    theirs = [layer(entered[:, :length], cache)]
    ours = [part.out_proj(part.mixed(part.in_proj(entered[:, :length]), state))]
    for t in range(length, length + 3):
        theirs.append(layer(entered[:, t : t + 1], cache))
        ours.append(part.out_proj(part.stepped(part.in_proj(entered[:, t]), state))[:, None])
    wanted = torch.cat(theirs, 1)
    assert (torch.cat(ours, 1) - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("changes", [{}, {"gate": False, "norm": "both"}, {"conv_width": 4, "num_key_heads": 6}])
@pytest.mark.parametrize("prompt", [1, 2, 8, 19])
def test_a_prompt_and_steps_are_the_whole_sequence(prompt, changes):
    sub_block = replace(SIZES, **changes)
    part, x = loaded(sub_block, weights(sub_block)), stream(2, 24)
    whole = part.add(x, {})
    state = part.new_state(2, 24, x)
    assert (part.prefill(x[:, :prompt], {}, state) - whole[:, :prompt]).abs().max() <= 1e-12
    for t in range(prompt, 24):
        assert (part.decode(x[:, t : t + 1], {}, state, t) - whole[:, t : t + 1]).abs().max() <= 1e-12
    assert state.num_bytes == 2 * 8 * (state.inputs[0].numel() + state.hidden[0].numel())
    assert sub_block.state().own_bytes == 4 * state.hidden[0].numel()
    assert sub_block.state().per_sequence == state.inputs[0].numel()


def test_what_a_sequence_keeps_does_not_grow():
    """Qwen3-Next-80B-A3B: 2 MiB of recurrent state in float32 whatever the cache's precision, and the convolution's in bf16."""
    sub_block = GatedDelta(hidden_size=2048, num_key_heads=16, key_dim=128, num_value_heads=32, value_dim=128)
    state = sub_block.state()
    for cache in ("bf16", "fp8"):
        assert state.num_bytes(1, cache) == state.num_bytes(10**6, cache, 64) == 2 * 2**20 + 2 * 3 * 8192
    assert not sub_block.by_rows
    assert replace(sub_block, state_dtype="bfloat16").state().own_bytes * 2 == state.own_bytes
    assert (
        sub_block.num_parameters
        == sub_block.active_parameters()
        == 2048 + 2048 * (12288 + 64) + 4 * 8192 + 64 + 128 + 4096 * 2048
    )


@pytest.mark.parametrize("changes", [{}, {"gate": False, "norm": "both"}])
def test_shares_add_up(changes):
    """Of whole key heads: their contributions, before a norm after, are the whole one's."""
    whole, x = replace(SIZES, **changes), stream(2, 19)
    own = weights(whole)
    shares = [loaded(whole.shared(2), whole.cut(own, rank, 2)) for rank in range(2)]
    entered = loaded(whole, own).enter(x)
    added = sum(share.inner(entered, {}) for share in shares)
    assert (added - loaded(whole, own).inner(entered, {})).abs().max() <= 1e-12
    with pytest.raises(UserError, match="`tp` 4: num_key_heads 2 does not divide by it"):
        whole.shared(4)


def test_it_learns():
    part = blank(SIZES, "cpu").double()
    part.load_state_dict(weights(SIZES))
    part(stream(2, 19), {}).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_in_its_place():
    """A matrix, fitted on what it gives, or nothing."""
    assert default_names(SIZES) == ["linear", "none"]
    linear, own = variant_of(SIZES, "linear"), weights(SIZES)
    assert isinstance(linear.sub_block, Linear)
    block = ParentBlock(sub_block=SIZES, weights=own, moments=lambda: loaded(SIZES, own).moments([stream(2, 40)], {}))
    assert linear.initialise(block)["linear.weight"].shape == (20, 20)
    with pytest.raises(MissingFace, match="'gated_delta' have no face in vLLM without a gate"):
        replace(SIZES, gate=False).in_vllm(None)


ATTENTION = Gqa(hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=6)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gdn", (4, 6, 4, 6)),
        ("gdn-nogate", (4, 6, 4, 6)),
        ("gdn-2x6-4x6", (2, 6, 4, 6)),
        ("gdn-1x6-2x6", (1, 6, 2, 6)),
        ("gdn-3x5-6x7-nogate", (3, 5, 6, 7)),
    ],
)
def test_in_place_of_attention(name, sizes):
    assert "gdn" not in " ".join(default_names(ATTENTION))
    own = ParentBlock(sub_block=ATTENTION, weights=weights(ATTENTION))
    variant = variant_of(ATTENTION, name)
    made = variant.sub_block
    assert isinstance(made, GatedDelta)
    assert (made.num_key_heads, made.key_dim, made.num_value_heads, made.value_dim) == sizes
    assert made.gate is ("nogate" not in name)
    torch.manual_seed(0)
    found = variant.initialise(own)
    assert {n: tuple(t.shape) for n, t in found.items()} == made.tensors()
    assert all(t.dtype == torch.float32 for t in found.values())
    part = loaded(made, found)
    added = part(stream(2, 21).float(), {})
    assert 0.03 < added.std() < 3 if "nogate" in name else not added.any()
    _, beta, logs = part.parts(torch.zeros(1, 1, made.conv_channels), torch.zeros(1, 1, 2 * made.num_value_heads))[2:]
    assert (beta == 0.5).all()
    assert (logs.exp() > 0.9).all()
    assert (logs.exp() < 0.9991).all()


def test_what_is_copied():
    """With a head for every query head all of it, keys and values repeated; where heads become fewer, means, of o sums."""
    own = weights(ATTENTION, dtype=torch.float32)
    block = ParentBlock(sub_block=ATTENTION, weights=own)
    made = variant_of(ATTENTION, "gdn-nogate")
    found = made.initialise(block)
    q, k, v, rest = found["in_proj.weight"].split((24, 24, 24, 8))
    assert torch.equal(q, own["q_proj.weight"])
    for copied, name in ((k, "k_proj.weight"), (v, "v_proj.weight")):
        assert torch.equal(copied, own[name].view(2, 6, 20).repeat_interleave(2, dim=0).flatten(0, 1))
    assert not rest.any()
    assert torch.equal(found["out_proj.weight"], own["o_proj.weight"])
    fewer = variant_of(ATTENTION, "gdn-2x6-2x6-nogate").initialise(block)
    q, k, v, _ = fewer["in_proj.weight"].split((12, 12, 12, 4))
    assert torch.allclose(q, own["q_proj.weight"].view(2, 2, 6, 20).mean(1).flatten(0, 1))
    assert torch.equal(torch.cat((k, v)), torch.cat((own["k_proj.weight"], own["v_proj.weight"])))
    assert torch.allclose(fewer["out_proj.weight"], own["o_proj.weight"].view(20, 2, 2, 6).sum(2).flatten(1))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("gdn-4x6", "write Gated DeltaNet as gdn, with the attention's query heads, or as gdn-MxK-NxV"),
        ("gdn4", "write Gated DeltaNet as gdn"),
        ("gdn-0x6-4x6", "sizes are at least 1, and N is a multiple of M"),
        ("gdn-4x6-6x6", "sizes are at least 1, and N is a multiple of M"),
    ],
)
def test_names_that_mean_nothing(name, wanted):
    with pytest.raises(UserError, match=wanted):
        variant_of(ATTENTION, name)
    with pytest.raises(UserError, match="6 value heads do not share 4 key heads"):
        replace(SIZES, num_key_heads=4)
