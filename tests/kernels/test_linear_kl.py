"""linear_kl, both ways, against its twin in float64: values, gradients, exact zeros, and small divergences."""

from __future__ import annotations

import pytest
import torch

from puzzle.kernels import linear_kl as module
from puzzle.kernels.linear_kl import Chunks, Fused, linear_kl, linear_kl_by_rows, linear_kl_of_many, linear_kl_reference

CONFIGS = [
    pytest.param(Chunks(tokens=5, words=40, block=32), id="chunks"),
    pytest.param(Chunks(), id="one-chunk"),
    pytest.param(Fused(block_t=16, block_v=32, block_h=16, splits=3, rows_together=2, num_warps=4), id="fused"),
]


def draw(device, num_tokens, hidden, vocab, dtype=torch.float32, shift=0.3):
    """Hidden states of a parent and of a child near it, and a head, with logits of order 4."""
    torch.manual_seed(num_tokens + hidden + vocab)
    parent = torch.randn(num_tokens, hidden, device=device)
    child = (parent + shift * torch.randn(num_tokens, hidden, device=device)).to(dtype)
    weight = 4 * torch.randn(vocab, hidden, device=device) / hidden**0.5
    targets = torch.randint(vocab, (num_tokens,), device=device)
    targets[::3] = -100
    return parent.to(dtype), child, weight.to(dtype), targets


def twin(parent, child, weight, child_weight=None, targets=None):
    wide = [None if x is None else x.double() for x in (parent, child, weight, child_weight)]
    return linear_kl_reference(*wide, targets)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("heads", ["shared", "two"])
@pytest.mark.parametrize(("num_tokens", "hidden", "vocab"), [(1, 32, 63), (7, 64, 210), (19, 32, 97)])
def test_matches_twin(device, relative_error, num_tokens, hidden, vocab, heads, config):
    parent, child, weight, targets = draw(device, num_tokens, hidden, vocab)
    other = None if heads == "shared" else weight + 0.1 * torch.randn_like(weight)
    found = linear_kl(parent, child, weight, other, targets, config=config)
    want = twin(parent, child, weight, other, targets)
    limit = 1e-5 if device.type == "cpu" else 3e-3  # tf32 products on a GPU
    assert relative_error(found.kl, want.kl) < limit
    assert relative_error(found.lm_loss, want.lm_loss) < limit or num_tokens == 1
    assert torch.equal(found.same_top1, want.same_top1)
    assert linear_kl(parent, child, weight, other, config=config).lm_loss is None


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_many_children_are_each_as_alone(device, config):
    """To the bit, and one that is the parent itself diverges by exactly zero."""
    parent, child, weight, targets = draw(device, 7, 32, 97)
    others = [child, parent.clone(), parent - 0.1 * child]
    for one, found in zip(others, linear_kl_of_many(parent, others, weight, targets, config=config), strict=True):
        alone = linear_kl(parent, one, weight, None, targets, config=config)
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert (linear_kl_of_many(parent, others[1:2], weight, config=config)[0].kl == 0).all()


@pytest.mark.parametrize("config", CONFIGS)
def test_identical_models_diverge_by_exactly_zero(device, config):
    for dtype in (torch.float32, torch.bfloat16):
        parent, _, weight, _ = draw(device, 7, 32, 97, dtype)
        for other in (None, weight.clone()):
            found = linear_kl(parent, parent.clone(), weight, other, config=config)
            assert (found.kl == 0).all()
            assert found.same_top1.all()


@pytest.mark.parametrize("config", CONFIGS)
def test_small_divergence_is_not_negative(device, config):
    parent, child, weight, _ = draw(device, 24, 32, 150, shift=1e-4)
    found = linear_kl(parent, child, weight, config=config)
    assert found.kl.min() >= -1e-6
    assert found.kl.double().mean().item() == pytest.approx(twin(parent, child, weight).kl.mean().item(), abs=3e-7)


@pytest.mark.parametrize("config", CONFIGS)
def test_bf16(device, relative_error, config):
    """A KL of a thousandth of a nat survives logits in bf16, because the difference is what gets rounded."""
    parent, child, weight, targets = draw(device, 32, 64, 150, torch.bfloat16, shift=0.02)
    weight = 4 * weight  # logits of order 16, spaced by 0.125
    found = linear_kl(parent, child, weight, None, targets, config=config)
    want = twin(parent, child, weight, None, targets)
    assert found.kl.mean().item() == pytest.approx(want.kl.mean().item(), rel=0.05)
    assert relative_error(found.lm_loss, want.lm_loss) < 0.02


def test_float32_logits_of_bf16_inputs(device, relative_error):
    parent, child, weight, _ = draw(device, 20, 64, 300, torch.bfloat16)
    other = weight.roll(1, 1)
    config = Chunks(tokens=8, words=128, logits=torch.float32)
    found = linear_kl(parent, child, weight, other, config=config)
    assert relative_error(found.kl, twin(parent, child, weight, other).kl) < 1e-5


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("heads", ["shared", "two"])
def test_gradient(device, relative_error, heads, config):
    parent, child, weight, targets = draw(device, 11, 32, 150)
    other = None if heads == "shared" else weight.flip(0)
    upstream = torch.randn(2, 11, device=device)
    child.requires_grad_()
    found = linear_kl(parent, child, weight, other, targets, config=config, backward=Chunks(tokens=4, words=64))
    (found.kl * upstream[0] + found.lm_loss * upstream[1]).sum().backward()
    exact = child.detach().double().requires_grad_()
    want = twin(parent, exact, weight, other, targets)
    (want.kl * upstream[0] + want.lm_loss * upstream[1]).sum().backward()
    assert relative_error(child.grad, exact.grad) < (1e-5 if device.type == "cpu" else 3e-3)
    child.grad = None
    linear_kl(parent, child, weight, other, config=config).kl.sum().backward()
    assert torch.isfinite(child.grad).all()


def test_gradient_in_bf16(device, relative_error):
    parent, child, weight, _ = draw(device, 16, 64, 300, torch.bfloat16)
    child.requires_grad_()
    linear_kl(parent, child, weight, backward=Chunks(tokens=16, words=96)).kl.sum().backward()
    exact = child.detach().double().requires_grad_()
    twin(parent, exact, weight).kl.sum().backward()
    assert child.grad.dtype == torch.bfloat16
    assert relative_error(child.grad, exact.grad) < 0.03


@pytest.mark.parametrize("heads", ["shared", "two"])
def test_by_rows_is_the_twin(device, heads):
    """Values and gradients of hidden states and heads, computed again chunk by chunk."""
    drawn = [x.double() if x.is_floating_point() else x for x in draw(device, 11, 32, 150)]
    parent, child, weight, targets = drawn
    other = None if heads == "shared" else weight.flip(0)
    wanted = [x for x in (parent, child, weight, other) if x is not None]
    for x in wanted:
        x.requires_grad_()
    found = linear_kl_by_rows(parent, child, weight, other, targets, Chunks(tokens=8, words=75))
    want = linear_kl_reference(parent, child, weight, other, targets)
    for x, y in zip(found[:2], want[:2], strict=True):
        torch.testing.assert_close(x, y)
        gradients = [
            torch.autograd.grad(z.square().sum(), wanted, retain_graph=True, allow_unused=True) for z in (x, y)
        ]
        torch.testing.assert_close(*gradients)
    assert torch.equal(found.same_top1, want.same_top1)
    assert linear_kl_by_rows(parent, child, weight, other, None, Chunks(tokens=1, words=30)).lm_loss is None


def test_logits_far_from_zero(device):
    """A constant on all logits of a token changes nothing, also when it is large."""
    parent, child, weight, _ = draw(device, 8, 32, 100)
    want = linear_kl(parent, child, weight, config=Chunks(words=32)).kl
    ones = torch.ones(8, 1, device=device)
    moved = torch.cat((weight, 100 * torch.ones(100, 1, device=device)), dim=1)
    other = torch.cat((weight, 60 * torch.ones(100, 1, device=device)), dim=1)
    found = linear_kl(
        torch.cat((parent, ones), 1), torch.cat((child, ones), 1), moved, other, config=Chunks(words=32)
    ).kl
    assert torch.allclose(found, want, rtol=1e-3 if device.type == "cpu" else 1e-1, atol=1e-4)


def test_wrong_arguments(device):
    parent, child, weight, targets = draw(device, 4, 32, 50)
    with pytest.raises(ValueError, match="heads"):
        linear_kl(parent, child[:3], weight)
    with pytest.raises(ValueError, match="one dtype"):
        linear_kl(parent, child.bfloat16(), weight)
    with pytest.raises(ValueError, match="targets"):
        linear_kl(parent, child, weight, None, targets[:2])


def test_no_more_logits_than_asked_for(monkeypatch):
    """Without the kernel at most tokens × words logits exist at once, whatever the number of tokens."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rows = []
    reference = module.linear_kl_reference
    monkeypatch.setattr(module, "linear_kl_reference", lambda p, *rest: (rows.append(len(p)), reference(p, *rest))[1])
    parent, child = torch.randn(2, 25, 8)
    module.linear_kl(parent, child, torch.randn(100, 8), config=Chunks(tokens=20, words=50))
    assert rows == [10, 10, 5]
