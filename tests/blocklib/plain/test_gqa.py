"""Softmax attention in plain PyTorch: its cache, and windows in blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from puzzle.blocklib.plain import gqa
from puzzle.blocklib.plain.gqa import windowed_attention
from puzzle.blocklib.plain.part import blank, causal_mask
from puzzle.blocklib.sub_block import parse_key


def test_windowed_cache_is_bounded(make_layer):
    attention = make_layer()["attention"].sub_block
    like = torch.zeros(())
    cache = replace(attention, window=8).module().new_state(2, 1000, like)
    assert cache.num_bytes == 2 * 2 * 4 * 8 * 6 * 4  # K and V, batch, KV heads, slots, head_dim, bytes
    assert attention.module().new_state(2, 1000, like).num_bytes == 2 * 2 * 4 * 1000 * 6 * 4
    assert replace(attention, window=8).module().new_state(2, 5, like).num_bytes == 2 * 2 * 4 * 5 * 6 * 4


@pytest.mark.parametrize(("tokens", "window", "block"), [(1, 1, 4), (8, 4, 4), (37, 5, 8), (40, 8, 8), (9, 3, 16)])
def test_a_window_in_blocks_is_the_masked_one(tokens, window, block):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, 6).double().requires_grad_() for heads in (6, 2, 2))
    upstream = torch.randn(2, 6, tokens, 6).double()
    out = windowed_attention(q, k, v, window, block, 0.3)
    wide_k, wide_v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    mask = causal_mask(tokens, window, q.device)
    wanted = F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, wanted)
    grads, expected = (torch.autograd.grad(o, (q, k, v), upstream) for o in (out, wanted))
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("tokens", [1, 9, 40, 70])
@pytest.mark.parametrize(
    "key", ["gqa h8 q6 kv2 d5 sinks rope=none", "gqa h8 q6 kv3 d4 window7 sinks rope=none scale=0.4"]
)
def test_sinks(key, tokens, monkeypatch):
    """A logit more in every head's softmax: of whole sequences, in blocks, in decode steps, and of the gradients."""
    torch.manual_seed(0)
    monkeypatch.setattr(gqa, "BLOCK", 16)
    own = parse_key(key)
    part = blank(own, "cpu").double()
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, tokens, 8).double()

    def written(x):
        q, k, v = part.project(part.enter(x), {})
        k, v = (t.repeat_interleave(6 // own.num_key_value_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(2, 3) * (own.scale or own.head_dim**-0.5)
        scores = scores.masked_fill(~causal_mask(tokens, own.window or tokens, x.device), -torch.inf)
        beside = part.sinks[:, None, None].expand(2, -1, tokens, 1)
        return part.output(torch.cat((scores, beside), dim=-1).softmax(-1)[..., :-1] @ v)

    out, wanted = part(x, {}), written(x)
    torch.testing.assert_close(out, wanted)
    weights = list(part.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), weights) for o in (out, wanted)))
    state = part.new_state(2, tokens, x)
    cut = max(1, tokens // 2)
    found = [part.prefill(x[:, :cut], {}, state)]
    found += [part.decode(x[:, n : n + 1], {}, state, n) for n in range(cut, tokens)]
    torch.testing.assert_close(torch.cat(found, dim=1), x + wanted)


def test_long_sequences_take_a_window_in_blocks(monkeypatch):
    """Which changes nothing but the work."""
    torch.manual_seed(0)
    part = blank(parse_key("gqa h8 q2 kv1 d4 window5 rope=none"), "cpu").double()
    for parameter in part.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 70, 8).double()
    whole = part(x, {})
    monkeypatch.setattr(gqa, "BLOCK", 16)
    calls = []
    monkeypatch.setattr(gqa, "windowed_attention", lambda *a: calls.append(a) or windowed_attention(*a))
    torch.testing.assert_close(part(x, {}), whole)
    assert len(calls) == 1
