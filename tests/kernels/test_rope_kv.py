"""rope_kv against its twin: rotation, where K and V land in the pages, and fp8."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels.rope_kv import rope_kv, rope_kv_reference


def tables(num_positions: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [P, D] as Hugging Face models make them."""
    angles = torch.arange(num_positions)[:, None] / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.cat((angles, angles), dim=1).to(device)
    return angles.cos(), angles.sin()


def paged(batch: int, length: int, heads: int, page: int, dim: int, dtype: torch.dtype, device: torch.device):
    """A poisoned cache and a block table in shuffled order."""
    pages = -(-length // page)
    table = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    cache = torch.full((batch * pages, 2, heads, page, dim), torch.nan, device=device).to(dtype)
    return cache, table


def gather(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """The cache as [2, B, length, K, D] in float32."""
    rows = cache.float()[table.long()]  # [B, pages, 2, K, S, D]
    return rows.permute(2, 0, 1, 4, 3, 5).flatten(2, 3)[:, :, :length]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Hugging Face's formula in float64. x [B, T, heads, D], cos and sin [T, D]"""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x.double() * cos[:, None].double() + turned * sin[:, None].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "dim", "page"),
    [(1, 1, 4, 4, 16, 4), (3, 7, 6, 3, 60, 4), (2, 9, 5, 1, 128, 8), (2, 5, 10, 2, 64, 64)],
)
def test_prefill(device, relative_error, batch, length, heads, kv_heads, dim, page, dtype):
    cos, sin = tables(length, dim, device)
    qkv = torch.randn(batch * length, heads + 2 * kv_heads, dim, device=device).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    cache, table = paged(batch, length, kv_heads, page, dim, dtype, device)
    positions = torch.arange(length, device=device).repeat(batch)
    out = rope_kv(q, k, v, cos, sin, positions, cache, table, out=torch.full_like(q.contiguous(), torch.nan))
    limit = 4e-3 if dtype == torch.bfloat16 else 1e-6
    grid = (batch, length, -1, dim)
    keys, values = gather(cache, table, length)
    assert relative_error(out, rotated(q.reshape(grid), cos, sin).flatten(0, 1)) < limit
    assert relative_error(keys, rotated(k.reshape(grid), cos, sin)) < limit
    assert torch.equal(values, v.reshape(grid).float())
    other = torch.full_like(cache, torch.nan)
    again = rope_kv_reference(q, k, v, cos, sin, positions, other, table)
    assert relative_error(again, out) < limit
    assert relative_error(gather(other, table, length), gather(cache, table, length)) < limit


def test_decode_touches_one_row(device, relative_error):
    batch, heads, kv_heads, dim, page, length = 5, 4, 2, 32, 4, 10
    cos, sin = tables(length, dim, device)
    q = torch.randn(batch, heads, dim, device=device)
    k, v = torch.randn(2, batch, kv_heads, dim, device=device)
    cache, table = paged(batch, length, kv_heads, page, dim, torch.float32, device)
    positions = torch.tensor([0, 3, 4, 9, 7], dtype=torch.int32, device=device)
    query = q.clone()
    assert rope_kv(query, k, v, cos, sin, positions, cache, table, out=query) is query
    twin = torch.full_like(cache, torch.nan)
    want = rope_kv_reference(q, k, v, cos, sin, positions, twin, table)
    assert relative_error(query, want) < 1e-6
    assert torch.equal(cache.isnan(), twin.isnan())
    assert relative_error(cache.nan_to_num(), twin.nan_to_num()) < 1e-6


def test_sequences_slots_and_half_tables(device, relative_error):
    """Ragged sequences; a slot of -1 stores nothing; tables of D/2 columns serve as well."""
    dim, page = 16, 4
    cos, sin = tables(8, dim, device)
    q = torch.randn(5, 3, dim, device=device)
    k, v = torch.randn(2, 5, 2, dim, device=device)
    positions = torch.tensor([0, 1, 5, 6, 7], device=device)
    cache, table = paged(2, 8, 2, page, dim, torch.float32, device)
    owner = torch.tensor([1, 1, 0, 0, 0], device=device)
    first = rope_kv(q, k, v, cos, sin, positions, cache, table, sequences=owner)
    slots = table[owner, positions // page] * page + positions % page
    slots[0] = -1
    other = torch.full_like(cache, torch.nan)
    half = dim // 2
    second = rope_kv(
        q, k, v, cos[:, :half].contiguous(), sin[:, :half].contiguous(), positions, other, None, slots=slots
    )
    assert relative_error(second, first) < 1e-6
    block, row = divmod(int(table[1, 0]) * page, page)
    assert other[block, :, :, row].isnan().all()
    cache[block, :, :, row] = torch.nan
    assert torch.equal(cache.nan_to_num(), other.nan_to_num())
    assert torch.equal(cache.isnan(), other.isnan())


def test_fp8_cache(device, relative_error):
    batch, length, kv_heads, dim, page = 2, 6, 3, 32, 4
    cos, sin = tables(length, dim, device)
    q = torch.randn(batch * length, 3, dim, device=device).bfloat16()
    k, v = 8 * torch.randn(2, batch * length, kv_heads, dim, device=device).bfloat16()
    v[0, 0, 0] = 1e6  # beyond what e4m3 holds: clamped, not NaN
    positions = torch.arange(length, device=device).repeat(batch)
    cache, table = paged(batch, length, kv_heads, page, dim, torch.float8_e4m3fn, device)
    rope_kv(q, k, v, cos, sin, positions, cache, table, k_scale=0.5, v_scale=0.25)
    twin = torch.full_like(cache.float(), torch.nan).to(cache.dtype)
    rope_kv_reference(q, k, v, cos, sin, positions, twin, table, k_scale=0.5, v_scale=0.25)
    keys, values = gather(cache, table, length)
    assert values[0, 0, 0, 0] == 448
    want_keys, want_values = gather(twin, table, length)
    assert relative_error(keys * 0.5, rotated(k.view(batch, length, kv_heads, dim), cos, sin)) < 0.04
    assert relative_error(keys, want_keys) < 0.01  # the kernel multiplies by 1/scale and may land on a neighbour
    assert relative_error(values, want_values) < 0.01


def test_fp8_cache_keeps_what_it_can_hold(device):
    """Small integers over a power of two are exact in e4m3; position 0 rotates nothing."""
    cos, sin = tables(1, 16, device)
    k, v = torch.randint(-8, 9, (2, 3, 2, 16), device=device).bfloat16()
    cache, table = paged(3, 1, 2, 4, 16, torch.float8_e4m3fn, device)
    positions = torch.zeros(3, dtype=torch.int32, device=device)
    rope_kv(k, k, v, cos, sin, positions, cache, table, k_scale=0.5, v_scale=4.0)
    keys, values = gather(cache, table, 1)
    assert torch.equal(keys[:, 0] * 0.5, k.float())
    assert torch.equal(values[:, 0] * 4.0, v.float())


def test_wrong_arguments(device):
    q = torch.randn(3, 2, 8, device=device)
    cos, sin = tables(4, 8, device)
    cache, table = paged(2, 4, 2, 4, 8, torch.float32, device)
    positions = torch.arange(3, device=device)
    with pytest.raises(ValueError, match="give `sequences`"):
        rope_kv(q, q, q, cos, sin, positions, cache, table)
    with pytest.raises(ValueError, match="not both"):
        rope_kv(q, q, q, cos, sin, positions, cache, None)
    with pytest.raises(ValueError, match="is not"):
        rope_kv(q, q, q, cos, sin, positions, cache[:, :, :1], table)
