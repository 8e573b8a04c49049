"""block_loss and its gradient against the twin in float64."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels import block_loss as module
from puzzle.kernels.block_loss import block_loss, block_loss_reference, energy, output_gradient


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
@pytest.mark.parametrize("shape", [(1,), (7, 63), (2, 5, 500), (3, 2048)])
def test_matches_twin(device, relative_error, shape, dtypes):
    parent = torch.randn(shape, device=device).to(getattr(torch, dtypes[1]))
    child = (parent.float() + 0.3 * torch.randn(shape, device=device)).to(getattr(torch, dtypes[0]))
    loss, grad = block_loss(child, parent), output_gradient(child, parent, energy(parent))
    twin = child.double().requires_grad_()
    want = block_loss_reference(twin, parent.double())
    want.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=2e-6)
    assert grad.dtype == child.dtype
    assert relative_error(grad, twin.grad) < (4e-3 if child.dtype == torch.bfloat16 else 1e-6)


def test_every_gradient_is_written(device, monkeypatch):
    empty_like = torch.empty_like
    monkeypatch.setattr(module.torch, "empty_like", lambda x, **k: empty_like(x, **k).fill_(torch.nan))
    child, parent = torch.randn(2, 4099, device=device)
    loss, energy = module.loss_and_energy(child, parent)
    assert torch.isfinite(module.gradient(child, parent, energy)).all()
    assert torch.isfinite(loss)


def test_known_values(device):
    parent = torch.randn(9, 33, device=device)
    assert block_loss(parent.clone(), parent).item() == 0
    assert block_loss(torch.zeros_like(parent), parent).item() == 1
    assert torch.isfinite(block_loss(parent, torch.zeros_like(parent)))


def test_strided_inputs(device, relative_error):
    """Loss and gradient do not depend on how child and parent lie in memory."""
    base, parent = torch.randn(2, 8, 30, device=device)
    base = base.bfloat16()
    for turn in (lambda x: x.t(), lambda x: x[1::2, ::3], lambda x: x[:, None].expand(8, 5, 30)):
        child, target = turn(base), turn(parent)
        loss, grad = block_loss(child, target), output_gradient(child, target, energy(target))
        twin = child.double().requires_grad_()
        want = block_loss_reference(twin, target.double())
        want.backward()
        assert loss.item() == pytest.approx(want.item(), rel=1e-6)
        assert relative_error(grad, twin.grad) < 1e-2


@pytest.mark.gpu
def test_in_a_cuda_graph(relative_error):
    """Captured once, replayed with other inputs: loss and gradient follow."""
    child, parent = torch.randn(2, 6, 700, device="cuda")
    child = child.bfloat16()

    def step():
        return block_loss(child, parent), output_gradient(child, parent, energy(parent))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = step()
    for _ in range(2):
        child.copy_(torch.randn_like(child))
        parent.copy_(torch.randn_like(parent))
        graph.replay()
        want_loss, want_grad = step()
        assert loss.item() == want_loss.item()
        assert torch.equal(grad, want_grad)


def test_equal_bits(device):
    child, parent = torch.randn(2, 3, 7001, device=device)
    assert block_loss(child, parent).item() == block_loss(child, parent).item()


def test_wrong_shapes(device):
    with pytest.raises(ValueError, match="one non-empty shape"):
        block_loss(torch.ones(2, 3, device=device), torch.ones(3, 2, device=device))
    with pytest.raises(ValueError, match="one non-empty shape"):
        block_loss(torch.ones(0, device=device), torch.ones(0, device=device))
