"""RMSNorm's forward and backward kernels against the twin in float64, and against the modules that they stand in for."""

from __future__ import annotations

import pytest
import torch

from puzzle.blocklib.plain.part import RMSNorm
from puzzle.kernels import trained_norm as module
from puzzle.kernels.trained_norm import trained_norm, trained_norm_reference

EPS = 1e-5


def gradients(function, x, weight, upstream, offset):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight, EPS, offset)
    return out.detach(), *torch.autograd.grad(out, (x, weight), upstream)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 77), (45, 64), (9, 1000), (3, 5000)])
def test_matches_twin(device, relative_error, monkeypatch, shape, dtype, offset):
    """Weights stay in float32, as masters do. Programs take several blocks of rows each."""
    monkeypatch.setattr(module, "PROGRAMS_PER_SM", 1)
    x, upstream = ((3 * torch.randn(shape, device=device)).to(dtype) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], device=device)
    found = gradients(trained_norm, x, weight, upstream, offset)
    rounded = weight if offset else weight.to(dtype)  # as a Llama's norm multiplies
    wanted = gradients(trained_norm_reference, x.double(), rounded.double(), upstream.double(), offset)
    for one, other, kind in zip(found, wanted, (dtype, dtype, torch.float32), strict=True):
        assert one.dtype == kind
        if (
            shape[-1] > 1 or other.norm() > 1e-3
        ):  # of one number the root mean square is itself: its gradient is eps alone
            assert relative_error(one, other) < (6e-3 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_as_the_module_does(device, dtype, offset):
    x = torch.randn(50, 576, device=device).to(dtype)
    norm = RMSNorm(576, EPS, offset).to(device)
    norm.weight.data += 0.3 * torch.randn(576, device=device)
    found, wanted = trained_norm(x, norm.weight, EPS, offset), norm(x)
    assert found.dtype == wanted.dtype == dtype
    apart = (found - wanted).abs() / wanted.abs().clamp(min=1e-3)
    assert apart.max() < (1e-2 if dtype == torch.bfloat16 else 1e-5)  # one rounding, of few
    assert (apart > 0).float().mean() < (0.01 if dtype == torch.bfloat16 else 1.01)


def test_one_gradient_alone_and_rows_that_lie_apart(device, relative_error):
    x, weight = torch.randn(6, 7, 32, device=device).transpose(0, 1), torch.randn(32, device=device)
    upstream = torch.randn(7, 6, 32, device=device)
    out, of_x, of_weight = gradients(trained_norm, x, weight, upstream, False)
    assert torch.equal(out, trained_norm(x.contiguous(), weight, EPS))
    for of, wanted in ((0, of_x), (1, of_weight)):
        given = [t.clone().requires_grad_(n == of) for n, t in enumerate((x, weight))]
        [found] = torch.autograd.grad(trained_norm(*given, EPS), given[of], upstream)
        assert relative_error(found, wanted) < 1e-6
    again = [gradients(trained_norm, x, weight, upstream, False)[2] for _ in range(2)]
    assert torch.equal(*again)


def test_nothing_and_what_does_not_fit(device):
    weight = torch.ones(8, device=device)
    assert trained_norm(torch.ones(0, 8, device=device), weight, EPS).shape == (0, 8)
    with pytest.raises(ValueError, match=r"wants a weight \[4\], not \[8\]"):
        trained_norm(torch.ones(3, 4, device=device), weight, EPS)
