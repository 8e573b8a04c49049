"""The cache of softmax attention in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch


def test_windowed_cache_is_bounded(make_layer):
    attention = make_layer()["attention"].sub_block
    like = torch.zeros(())
    cache = replace(attention, window=8).module().new_state(2, 1000, like)
    assert cache.num_bytes == 2 * 2 * 4 * 8 * 6 * 4  # K and V, batch, KV heads, slots, head_dim, bytes
    assert attention.module().new_state(2, 1000, like).num_bytes == 2 * 2 * 4 * 1000 * 6 * 4
    assert replace(attention, window=8).module().new_state(2, 5, like).num_bytes == 2 * 2 * 4 * 5 * 6 * 4
