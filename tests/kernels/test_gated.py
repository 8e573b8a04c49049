"""silu(gate) · up and its gradients against the twin in float64."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels.gated import gated_silu, gated_silu_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 77), (2, 2048), (4099,)])
def test_matches_twin(device, relative_error, shape, dtype):
    gate, up = ((4 * torch.randn(shape, device=device)).to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.randn(shape, device=device).to(dtype)
    out = gated_silu(gate, up)
    grads = torch.autograd.grad(out, (gate, up), upstream)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    want = gated_silu_reference(*wide)
    close = 4e-3 if dtype == torch.bfloat16 else 1e-6
    assert out.dtype == dtype
    assert relative_error(out.detach(), want.detach()) < close
    for grad, wanted in zip(grads, torch.autograd.grad(want, wide, upstream.double()), strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, wanted) < close


def test_strided_inputs_and_shapes(device):
    gate, up = torch.randn(2, 6, 8, device=device)
    assert torch.equal(gated_silu(gate.T, up.T), gated_silu(gate, up).T)
    with pytest.raises(ValueError, match="one shape"):
        gated_silu(gate, up[:3])
