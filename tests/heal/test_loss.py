"""The loss against a plain twin that writes every logit down, in float64; and what it promises of its parts."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from puzzle.data.mixture import IGNORE
from puzzle.heal import loss
from puzzle.heal.loss import Learner, Teacher, Weights, cosine_distance, head_losses
from puzzle.runtime.model import load_model

WEIGHTS = Weights(kl=0.7, cosine=1.3, lm=0.4, temperature=1.5)
PAIRS = [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.fixture
def models(parent, child):
    return load_model(parent, dtype=torch.float64), load_model(child, dtype=torch.float64)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(384, (3, 17), generator=generator)
    labels = torch.randint(384, (3, 17), generator=generator)
    labels[torch.rand(3, 17, generator=generator) < 0.4] = IGNORE
    return ids, labels


def twin(parent, child, ids, labels, weights: Weights) -> torch.Tensor:
    """The formula at the top of loss.py, as plainly as possible."""
    counts = (labels != IGNORE).double()

    def states(model):
        x, found, ropes = model.embed(ids), [], model.ropes(ids.shape[1])
        for block in model.blocks:
            x = block(x, ropes)
            found.append(x)
        return found, model.norm(x) @ model.head_weight.T

    theirs, parent_logits = states(parent)
    mine, child_logits = states(child)
    tau = weights.temperature
    p, q = F.log_softmax(parent_logits / tau, -1), F.log_softmax(child_logits / tau, -1)
    kl = (p.exp() * (p - q)).sum(-1)
    cosine = sum(
        1 - (mine[c] * theirs[t]).sum(-1) / (mine[c].norm(dim=-1) * theirs[t].norm(dim=-1)) for c, t in PAIRS
    ) / len(PAIRS)
    lm = F.cross_entropy(child_logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    means = [(part * counts).sum() / counts.sum() for part in (kl, cosine)]
    return weights.kl * tau**2 * means[0] + weights.cosine * means[1] + weights.lm * lm / counts.sum()


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("tokens", [None, 8])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradient_equal_the_plain_twin(models, batch, train_head, tokens, recompute, monkeypatch):
    """With all logits at once and in chunks of 8 rows, with and without recomputed blocks."""
    monkeypatch.setattr(loss, "Chunks", partial(loss.Chunks, tokens=tokens))
    parent, child = models
    ids, labels = batch
    child.requires_grad_(True)
    child.embedding.requires_grad_(train_head)
    wanted = twin(parent, child, ids, labels, WEIGHTS)
    wanted.backward()
    gradients = {name: p.grad for name, p in child.named_parameters() if p.requires_grad}
    child.zero_grad(set_to_none=True)

    teacher = Teacher(parent, [layer for _, layer in PAIRS])
    learner = Learner(
        child, PAIRS, parent.head_weight if train_head else None, torch.float64, train_head=train_head,
        recompute=recompute,
    )  # fmt: skip
    ropes = child.ropes(17)
    scale = 1 / (labels != IGNORE).sum().double()
    with torch.no_grad():
        shown = teacher(ids, ropes)
    found = learner(ids, labels, ropes, shown, scale, WEIGHTS)
    found[0].backward()
    torch.testing.assert_close(found[0], wanted, rtol=1e-12, atol=0)
    assert len(gradients) > 20
    for name, p in child.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_a_perfect_child_has_no_loss(models, batch):
    parent, _ = models
    ids, labels = batch
    ropes = parent.ropes(17)
    shown = Teacher(parent, [0, 1, 2, 3])(ids, ropes)
    found = Learner(parent, PAIRS, None, torch.float64)(ids, labels, ropes, shown, torch.ones(()).double(), Weights())
    assert found[:3].abs().max() < 1e-12  # the last is its LM loss


def test_a_narrower_teacher_is_filled_up():
    """Other hidden size and more words: the KL over the common words, to rounding."""
    generator = torch.Generator().manual_seed(0)
    teacher, head = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 20), (70, 20)))
    child, own = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 32), (64, 32)))
    labels = torch.arange(9)
    kl, lm = head_losses(teacher, child, head, own, labels, 2.0)
    p = F.log_softmax(teacher @ head[:64].T / 2, -1)
    q = F.log_softmax(child @ own.T / 2, -1)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(lm, F.nll_loss(q, labels, reduction="none"))


def test_text_alone_needs_no_teacher(models, batch):
    _, child = models
    ids, labels = batch
    child.requires_grad_(True)
    ropes = child.ropes(17)
    found = Learner(child, [], None, torch.float64)(
        ids, labels, ropes, None, 1 / (labels != IGNORE).sum().double(), Weights(kl=0, cosine=0, lm=1)
    )
    wanted = F.cross_entropy(child(ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(found[0], wanted)
    assert not math.isnan(found[0].item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cosine_distance_is_that_of_torch(dtype):
    """Value and gradient, from the rounded inputs; a state of zeros has distance 1 and a finite gradient."""
    generator = torch.Generator().manual_seed(0)
    teacher = (3 * torch.randn(3, 7, 60, generator=generator)).to(dtype)
    child = (teacher + torch.randn(3, 7, 60, generator=generator)).to(dtype).requires_grad_(True)
    weight = torch.rand(3, 7, generator=generator)
    found, wanted = cosine_distance(child, teacher), 1 - F.cosine_similarity(child.float(), teacher.float(), dim=-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad((found * weight).sum(), child)
    (same,) = torch.autograd.grad((wanted * weight).sum(), child)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, same, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    nothing = torch.zeros(1, 60, dtype=dtype, requires_grad=True)
    cosine_distance(nothing, teacher[0, :1]).sum().backward()
    assert cosine_distance(nothing, teacher[0, :1]).item() == 1
    assert nothing.grad is not None
    assert nothing.grad.isfinite().all()
