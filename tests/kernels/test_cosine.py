"""1 - cosine and its gradient against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from puzzle.kernels.cosine import cosine_distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 77), (45, 64), (3, 5000)])
def test_matches_torch(device, relative_error, shape, dtype):
    child, teacher = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    teacher = (teacher + child).detach()  # near each other, as in healing
    child.requires_grad_()
    upstream = torch.randn(shape[:-1], device=device)
    out = cosine_distance(child, teacher)
    [grad] = torch.autograd.grad(out, child, upstream)
    wide = child.detach().double().requires_grad_()
    want = 1 - F.cosine_similarity(wide, teacher.double(), dim=-1)
    [wanted] = torch.autograd.grad(want, wide, upstream.double())
    assert out.dtype == torch.float32
    assert grad.dtype == dtype
    assert (out.double() - want).abs().max() < 1e-6
    if shape[-1] > 1:  # one number has no angle: the gradient is 0
        assert relative_error(grad, wanted) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_is_far_from_everything_and_has_a_finite_gradient(device):
    child, teacher = torch.zeros(2, 8, device=device, requires_grad=True), torch.ones(2, 8, device=device)
    found = cosine_distance(child, teacher)
    assert found.tolist() == [1, 1]
    found.sum().backward()
    assert child.grad is not None
    assert torch.isfinite(child.grad).all()


def test_rows_that_lie_apart_and_shapes(device):
    child, teacher = torch.randn(2, 8, 6, device=device)
    assert torch.equal(
        cosine_distance(child.T, teacher.T), cosine_distance(child.T.contiguous(), teacher.T.contiguous())
    )
    assert cosine_distance(child[:0], teacher[:0]).shape == (0,)
    with pytest.raises(ValueError, match="one shape"):
        cosine_distance(child, teacher[:3])
