"""rms_norm against its twin in float64, at sizes that fill no tile."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels.rmsnorm import rms_norm, rms_norm_reference

EPS = 1e-5


def poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 63), (7, 500), (2, 3, 128)])
def test_matches_twin(device, relative_error, shape, with_residual, with_weight, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    residual = torch.randn(shape, device=device).to(dtype) if with_residual else None
    weight = (1 + 0.1 * torch.randn(shape[-1], device=device)).to(dtype) if with_weight else None
    normed, stream = rms_norm(x, residual, weight, EPS, out=poisoned(x), stream_out=poisoned(x))
    total = x if residual is None else x + residual  # rounded as the kernel rounds it
    want, _ = rms_norm_reference(total.double(), None, None if weight is None else weight.double(), EPS)
    assert torch.equal(stream, total)
    assert relative_error(normed, want) < (4e-3 if dtype == torch.bfloat16 else 1e-6)


def test_rounds_as_the_twin_does(device):
    x = torch.randn(5, 96, device=device).bfloat16()
    weight = torch.randn(96, device=device).bfloat16()
    normed, _ = rms_norm(x, None, weight, EPS)
    want, _ = rms_norm_reference(x, None, weight, EPS)
    assert (normed != want).float().mean() < 0.02  # a last bit where the sums were added in another order


def test_writes_over_its_inputs(device, relative_error):
    x, residual = torch.randn(2, 4, 48, device=device)
    want, total = rms_norm_reference(x, residual, None, EPS)
    normed, stream = rms_norm(x, residual, None, EPS, out=x, stream_out=residual)
    assert normed is x
    assert stream is residual
    assert relative_error(x, want) < 1e-6
    assert torch.equal(residual, total)


def test_large_values_do_not_overflow(device):
    normed, _ = rms_norm(torch.full((2, 64), 3e4, device=device).bfloat16(), None, None, EPS)
    assert torch.equal(normed, torch.ones_like(normed))


def test_wants_gradients_of_the_twin(device):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    rms_norm(x, None, None, EPS)[0].sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_wrong_shapes(device):
    x = torch.randn(3, 16, device=device)
    with pytest.raises(ValueError, match="same shape"):
        rms_norm(x, torch.randn(2, 16, device=device), None, EPS)
    with pytest.raises(ValueError, match=r"weight \[16\]"):
        rms_norm(x, None, torch.ones(8, device=device), EPS)
