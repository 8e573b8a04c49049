"""skinny_linear against its twin in float64: every option at odd sizes."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels.skinny import Config, _counters, skinny_linear, skinny_linear_reference

PLAIN = Config(block_n=32, block_k=64, num_warps=4, num_stages=2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("rows", "columns", "num"), [(1, 63, 2), (5, 64, 70), (16, 200, 128), (64, 129, 34)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_twin(device, relative_error, rows, columns, num, split, gated, dtype):
    x, w = torch.randn(rows, columns, device=device).to(dtype), torch.randn(num, columns, device=device).to(dtype)
    out = skinny_linear(x, w, PLAIN._replace(split_k=split), gated=gated)
    want = skinny_linear_reference(x.double(), w.double(), gated=gated)
    assert out.dtype == dtype
    assert relative_error(out, want) < (5e-3 if dtype == torch.bfloat16 else 2e-6)
    out = skinny_linear(x, w, PLAIN._replace(split_k=split), gated=gated, dtype=torch.float32)
    assert out.dtype == torch.float32
    assert relative_error(out, want) < 2e-6


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("split", [1, 2])
def test_fp8_weights(device, relative_error, gated, split):
    x = torch.randn(7, 96, device=device).to(torch.bfloat16)
    w, scale = torch.randn(38, 96, device=device).to(torch.float8_e4m3fn), torch.rand(38, device=device) + 0.5
    out = skinny_linear(x, w, PLAIN._replace(split_k=split), scale=scale, gated=gated)
    want = skinny_linear_reference(x.double(), w, scale=scale.double(), gated=gated)
    assert relative_error(out, want) < 5e-3


def test_counters_return_to_zero_and_bits_repeat(device):
    x, w = torch.randn(3, 256, device=device), torch.randn(64, 256, device=device)
    found = [skinny_linear(x, w, PLAIN._replace(split_k=4)) for _ in range(3)]
    assert all(torch.equal(found[0], other) for other in found)
    assert int(_counters(x.device).abs().sum()) == 0


def test_every_element_is_written(device, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    x, w = torch.randn(9, 65, device=device), torch.randn(33 * 2, 65, device=device)
    for gated in (False, True):
        assert torch.isfinite(skinny_linear(x, w, PLAIN._replace(split_k=2), gated=gated)).all()


def test_bad_shapes(device):
    x, w = torch.randn(3, 8, device=device), torch.randn(4, 8, device=device)
    for bad in (
        (torch.randn(65, 8, device=device), w, None),
        (x, torch.randn(4, 9, device=device), None),
        (x, w, torch.ones(4, device=device)),
        (x, w.to(torch.float8_e4m3fn), None),
    ):
        with pytest.raises(ValueError, match="wants at most 64 rows"):
            skinny_linear(bad[0], bad[1], PLAIN, scale=bad[2])
