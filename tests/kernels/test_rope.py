"""RoPE forward and backward against the twin in float64."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels.rope import rope, rope_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "heads", "tokens", "dim"), [(1, 1, 1, 2), (2, 3, 7, 10), (2, 8, 5, 64)])
def test_matches_twin(device, relative_error, batch, heads, tokens, dim, dtype):
    """Heads lie beside each other in memory, as products leave them; the halves of the tables need not be alike."""
    x = torch.randn(batch, tokens, heads, dim, device=device).to(dtype).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, tokens, dim, device=device)
    upstream = torch.randn(batch, heads, tokens, dim, device=device).to(dtype)
    out = rope(x, cos, sin)
    (grad,) = torch.autograd.grad(out, x, upstream)
    wide = x.detach().double().requires_grad_()
    want = rope_reference(wide, cos.double(), sin.double())
    (wanted,) = torch.autograd.grad(want, wide, upstream.double())
    close = 4e-3 if dtype == torch.bfloat16 else 1e-6
    assert out.dtype == grad.dtype == dtype
    assert relative_error(out.detach(), want.detach()) < close
    assert relative_error(grad, wanted) < close
    assert out.transpose(1, 2).is_contiguous()


def test_tables_that_do_not_fit(device):
    x, table = torch.randn(1, 2, 3, 8, device=device), torch.ones(3, 4, device=device)
    with pytest.raises(ValueError, match="tables"):
        rope(x, table, table)
