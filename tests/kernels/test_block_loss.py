"""block_loss and its gradient against the twin in float64."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels import block_loss as module
from puzzle.kernels.block_loss import block_loss, block_loss_reference


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("shape", [(1,), (7, 63), (2, 5, 500), (3, 2048)])
def test_matches_twin(device, relative_error, shape, dtypes):
    parent = torch.randn(shape, device=device).to(getattr(torch, dtypes[1]))
    child = (parent.float() + 0.3 * torch.randn(shape, device=device)).to(getattr(torch, dtypes[0])).requires_grad_()
    loss = block_loss(child, parent)
    (3 * loss).backward()
    twin = child.detach().double().requires_grad_()
    want = block_loss_reference(twin, parent.double())
    (3 * want).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=2e-6)
    assert child.grad.dtype == child.dtype
    assert relative_error(child.grad, twin.grad) < (4e-3 if child.dtype == torch.bfloat16 else 1e-6)


def test_every_gradient_is_written(device, monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(module.torch, "empty_like", lambda x, **k: empty_like(x, **k).fill_(torch.nan))
    child, parent = torch.randn(2, 4099, device=device)
    loss, energy = module.loss_and_energy(child, parent)
    assert torch.isfinite(module.gradient(child, parent, energy, torch.ones((), device=device))).all()
    assert torch.isfinite(loss)


def test_known_values(device):
    parent = torch.randn(9, 33, device=device)
    assert block_loss(parent.clone(), parent).item() == 0
    assert block_loss(torch.zeros_like(parent), parent).item() == 1
    assert torch.isfinite(block_loss(parent, torch.zeros_like(parent)))


def test_strided_inputs(device):
    child, parent = torch.randn(2, 8, 30, device=device)
    assert block_loss(child.t(), parent.t()).item() == pytest.approx(
        block_loss_reference(child, parent).item(), rel=1e-6
    )


def test_equal_bits(device):
    child, parent = torch.randn(2, 3, 7001, device=device)
    assert block_loss(child, parent).item() == block_loss(child, parent).item()


def test_wrong_shapes(device):
    with pytest.raises(ValueError, match="one non-empty shape"):
        block_loss(torch.ones(2, 3, device=device), torch.ones(3, 2, device=device))
    with pytest.raises(ValueError, match="one non-empty shape"):
        block_loss(torch.ones(0, device=device), torch.ones(0, device=device))
