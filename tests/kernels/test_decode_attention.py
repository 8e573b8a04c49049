"""decode_attention against its twin: odd sizes, ragged lengths, windows, fp8 caches, any number of stretches."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels.decode_attention import decode_attention, decode_attention_reference


def paged(device, batch, heads, kv_heads, dim, page, longest, dtype, cache_dtype=None):
    """A pool of shuffled pages full of NaN where nothing may be read."""
    pages = -(-longest // page)
    lengths = torch.randint(0, longest + 1, (batch,), device=device, dtype=torch.int32)
    lengths[0] = longest
    cache = torch.randn(batch * pages + 1, 2, kv_heads, page, dim, device=device).to(dtype)
    table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
    for b, length in enumerate(lengths.tolist()):
        for index in range(pages):
            first = max(0, min(page, length - index * page))
            cache[table[b, index], :, :, first:] = torch.nan
    q = torch.randn(batch, heads, dim, device=device).to(dtype)
    return q, cache.to(cache_dtype or dtype), table, lengths


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page", "window"),
    [(8, 8, 64, 16, None), (8, 2, 60, 16, None), (4, 1, 32, 48, 20), (32, 1, 64, 16, 7), (6, 2, 16, 16, 1000)],
)
def test_matches_twin(device, relative_error, heads, kv_heads, dim, page, window, splits):
    q, cache, table, lengths = paged(device, 3, heads, kv_heads, dim, page, 150, torch.float32)
    out = decode_attention(q, cache, table, lengths, max_context=150, window=window, splits=splits)
    want = decode_attention_reference(q.double(), cache.double(), table, lengths, max_context=150, window=window)
    assert relative_error(out, want) < 1e-5


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [None, 7])
def test_sinks(device, relative_error, window, splits):
    """Small ones, large ones, one that nothing reaches, and a sequence of nothing else; the twin against the softmax as it is written."""
    q, cache, table, lengths = paged(device, 3, 6, 2, 20, 16, 70, torch.float32)
    lengths[1] = 0
    sinks = torch.tensor([-80.0, -1.0, 0.0, 1.5, 4.0, 30.0], device=device)
    options = {"max_context": 70, "window": window, "sinks": sinks}
    out = decode_attention(q, cache, table, lengths, splits=splits, **options)
    want = decode_attention_reference(q.double(), cache.double(), table, lengths, **options)
    assert relative_error(out, want) < 1e-5
    assert (out[1] == 0).all()
    keys, values = _of_first(cache, table, 70).unbind(1)
    first = 0 if window is None else 70 - window
    for head in range(6):
        scores = torch.cat((keys[head // 3, first:70] @ q[0, head] * 20**-0.5, sinks[head : head + 1])).softmax(0)[:-1]
        torch.testing.assert_close(out[0, head], scores @ values[head // 3, first:70], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="one a head"):
        decode_attention(q, cache, table, lengths, max_context=70, sinks=sinks[:4])


def _of_first(cache, table, length):
    """Keys and values of the first sequence. [K, 2, T, D]"""
    return cache[table[0].long()].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :length]


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_types(device, relative_error, cache_dtype):
    q, cache, table, lengths = paged(device, 2, 8, 2, 64, 16, 70, torch.bfloat16, cache_dtype)
    options = {"max_context": 70, "k_scale": 0.5, "v_scale": 2.0}
    out = decode_attention(q, cache, table, lengths, splits=2, **options)
    want = decode_attention_reference(q.double(), cache, table, lengths, **options)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, want) < 1e-2


def test_empty_sequences_give_zeros(device):
    q, cache, table, lengths = paged(device, 3, 4, 2, 32, 16, 33, torch.float32)
    lengths[1] = 0
    assert (decode_attention(q, cache, table, lengths, max_context=33)[1] == 0).all()


def test_bad_shapes(device):
    q, cache, table, lengths = paged(device, 2, 4, 2, 32, 16, 33, torch.float32)
    for bad in ((q[:, :3], cache, table, lengths), (q, cache, table[:1], lengths), (q, cache, table, lengths[:1])):
        with pytest.raises(ValueError, match="does not fit cache"):
            decode_attention(*bad, max_context=33)
