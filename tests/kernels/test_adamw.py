"""One fused AdamW step against torch's, after clipping as torch clips, with gradients that autograd carries through the norm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from puzzle.kernels.adamw import Rule, Weight, adamw, adamw_reference

SHAPES = {"first": (11, 300), "second": (3, 300), "third": (33, 70), "bias": (41,)}
SCALED = ("first", "second")


def rule_of(lr: float, device, clip_norm: float = 1.0) -> Rule:
    return Rule(lr=torch.tensor(lr, device=device), beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=clip_norm)


def weights_of(device, copy_dtype=torch.bfloat16):
    norm = 1 + 0.3 * torch.randn(300, device=device)
    norm[7] = 0  # a channel that the norm has silenced
    found = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, device=device)
        copy = None if value.dim() == 1 else torch.empty(shape, dtype=copy_dtype, device=device)
        mean, square = 0.1 * torch.randn(shape, device=device), torch.rand(shape, device=device)
        found[name] = Weight(value=value, mean=mean, square=square, copy=copy, scaled=name in SCALED)
    zeros = torch.zeros(300, device=device)
    return found, Weight(value=norm, mean=zeros.clone(), square=zeros.clone())


def copied(weight: Weight) -> Weight:
    again = {name: getattr(weight, name).clone() for name in ("value", "mean", "square")}
    return Weight(**again, copy=None if weight.copy is None else weight.copy.clone(), scaled=weight.scaled)


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("clip_norm", [1e-2, 1e9])
def test_matches_twin(device, relative_error, with_norm, offset, clip_norm):
    weights, norm = weights_of(device)
    if not with_norm:
        weights = {n: Weight(value=w.value, mean=w.mean, square=w.square, copy=w.copy) for n, w in weights.items()}
    again, norm_again = {n: copied(w) for n, w in weights.items()}, copied(norm)
    steps, steps_again, rule = (
        torch.zeros((), device=device),
        torch.zeros((), device=device),
        rule_of(0.01, device, clip_norm),
    )
    for _ in range(3):
        grads = [
            torch.randn(w.value.shape, device=device).to((w.value if w.copy is None else w.copy).dtype)
            for w in weights.values()
        ]
        adamw(list(weights.values()), grads, norm if with_norm else None, offset, steps, rule)
        adamw_reference(list(again.values()), grads, norm_again if with_norm else None, offset, steps_again, rule)
    assert steps.item() == steps_again.item() == 3
    for one, other in zip([*weights.values(), norm], [*again.values(), norm_again], strict=True):
        assert relative_error(one.value, other.value) < 1e-6
        assert relative_error(one.mean, other.mean) < 1e-5
        assert relative_error(one.square, other.square) < 1e-5
        if one.copy is not None:
            assert (one.copy.float() - other.copy.float()).abs().max() <= 2**-8 * other.copy.float().abs().max()
            scale = norm.value + offset if one.scaled else 1
            assert torch.equal(one.copy, (one.value * scale).bfloat16())


@pytest.mark.parametrize("step", [adamw, adamw_reference])
def test_a_step_that_is_not_finite_changes_nothing(device, step):
    for bad in (float("nan"), float("inf"), 1e30):  # the square of the last one overflows
        weights, norm = weights_of(device)
        for weight in weights.values():
            weight.refresh(norm.value)
        before, steps = [copied(w) for w in (*weights.values(), norm)], torch.full((), 5.0, device=device)
        grads = [torch.randn(w.value.shape, device=device) for w in weights.values()]
        grads[2][5, 3] = bad
        step(list(weights.values()), grads, norm, 0.0, steps, rule_of(0.01, device))
        if bad == 1e30 and steps.item() == 6:
            continue  # torch's norm does not overflow
        assert steps.item() == 5
        for one, other in zip((*weights.values(), norm), before, strict=True):
            assert torch.equal(one.value, other.value)
            assert torch.equal(one.mean, other.mean)
            assert one.copy is None or torch.equal(one.copy, other.copy)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_gradient_of_the_norm_is_autograds(offset):
    """Twin in float64: W diag(s) reads x̂, and one step is that of torch's clip_grad_norm_ and AdamW on W and s themselves."""
    torch.manual_seed(0)
    x, target = torch.randn(50, 12).double(), torch.randn(50, 7).double()
    normed = F.rms_norm(x, (12,))
    first, scale = torch.randn(7, 12).double(), torch.randn(12).double()
    plain, plain_scale = first.clone().requires_grad_(), scale.clone().requires_grad_()
    optimizer = torch.optim.AdamW([plain, plain_scale], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    zeros = [torch.zeros_like(t) for t in (first, first, scale, scale)]
    weight = Weight(value=first, mean=zeros[0], square=zeros[1], copy=torch.empty_like(first), scaled=True)
    norm, steps = Weight(value=scale, mean=zeros[2], square=zeros[3]), torch.zeros(())
    weight.refresh(scale + offset)
    for _ in range(4):
        optimizer.zero_grad()
        ((normed * (plain_scale + offset)) @ plain.T - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([plain, plain_scale], 0.1)
        optimizer.step()
        copy = weight.copy.clone().requires_grad_()
        (grad,) = torch.autograd.grad((normed @ copy.T - target).square().mean(), copy)
        adamw_reference([weight], [grad], norm, offset, steps, rule_of(0.01, "cpu", clip_norm=0.1))
    torch.testing.assert_close(weight.value, plain.detach(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(norm.value, plain_scale.detach(), rtol=1e-8, atol=1e-8)
