"""swiglu and linear against plain PyTorch in float64, with few rows and many, in bf16 and fp8."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from puzzle.kernels import swiglu as module
from puzzle.kernels.fp8 import to_fp8
from puzzle.kernels.swiglu import linear, pack_swiglu, rows_to_fp8, silu_mul, silu_mul_to_fp8, swiglu


def weights(hidden, width, device, dtype):
    return [
        torch.randn(s, device=device).to(dtype) / s[1] ** 0.5
        for s in ((width, hidden), (width, hidden), (hidden, width))
    ]


@pytest.mark.parametrize(("rows", "hidden", "width"), [(1, 64, 48), (7, 129, 63), (64, 96, 500), (65, 64, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_plain_torch(device, relative_error, rows, hidden, width, dtype):
    gate, up, down = weights(hidden, width, device, dtype)
    x = torch.randn(rows, hidden, device=device).to(dtype)
    out = swiglu(x, pack_swiglu(gate, up, down))
    x, gate, up, down = (t.double() for t in (x, gate, up, down))
    want = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    assert out.dtype == dtype
    assert relative_error(out, want) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_linear_both_ways(device, relative_error, gated, monkeypatch):
    x, w = torch.randn(5, 96, device=device), torch.randn(80, 96, device=device)
    fused = linear(x, w, gated=gated)
    monkeypatch.setattr(module, "choose_linear", lambda *_: None)
    assert relative_error(linear(x, w, gated=gated), fused) < 1e-5


def test_fp8_weights_are_close(device, relative_error):
    gate, up, down = weights(128, 96, device, torch.bfloat16)
    x = torch.randn(9, 128, device=device).to(torch.bfloat16)
    out, exact = swiglu(x, pack_swiglu(gate, up, down, fp8=True)), swiglu(x, pack_swiglu(gate, up, down))
    assert 1e-3 < relative_error(out, exact) < 0.06


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5000)])
def test_rows_to_fp8(device, shape):
    x = torch.randn(shape, device=device)
    x[0] = 0
    value, scale = rows_to_fp8(x)
    want, want_scale = to_fp8(x)
    assert torch.equal(scale, want_scale)
    assert scale[0] == 1
    assert torch.equal(value.float(), want.float())


@pytest.mark.parametrize("shape", [(1, 2), (3, 126), (2, 5002)])
def test_silu_mul_to_fp8(device, relative_error, shape):
    gate_up = torch.randn(shape, device=device)
    gate_up[0] = 0
    value, scale = silu_mul_to_fp8(gate_up)
    want, want_scale = to_fp8(silu_mul(gate_up))
    torch.testing.assert_close(scale, want_scale)
    assert scale[0] == 1
    assert relative_error(value.float() * scale[:, None], want.float() * want_scale[:, None]) < 5e-3


def test_fp8_with_many_rows_is_close(device, relative_error, monkeypatch):
    gate, up, down = weights(128, 96, device, torch.bfloat16)
    x = torch.randn(80, 128, device=device).to(torch.bfloat16)
    if device.type == "cpu":  # no such product there
        monkeypatch.setattr(module, "fp8_product", _product)
    out, exact = swiglu(x, pack_swiglu(gate, up, down, fp8=True)), swiglu(x, pack_swiglu(gate, up, down))
    assert out.dtype == torch.bfloat16
    assert 1e-3 < relative_error(out, exact) < 0.08


def _product(x, x_scale, w, scale, dtype):
    return ((x.float() * x_scale[:, None]) @ (w.float() * scale[:, None]).T).to(dtype)


def test_every_element_is_written(device, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert torch.isfinite(silu_mul(torch.randn(3, 1030, device=device))).all()


def test_bad_shapes(device):
    gate, up, down = weights(8, 6, device, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        pack_swiglu(gate, up[:5], down)
    with pytest.raises(ValueError, match=r"wants \[M, 8\]"):
        swiglu(torch.randn(3, 9, device=device), pack_swiglu(gate, up, down))
