"""What scores and evaluation report (`puzzle.runtime.divergence`) against every log-probability written down in float64: through
the kernel, which only the tests of this folder have on a CPU, and through the plain way of `linear_kl`."""

from __future__ import annotations

import math

import pytest
import torch

from puzzle.kernels.linear_kl import Chunks, linear_kl
from puzzle.parents.structure import Structure
from puzzle.runtime import divergence
from puzzle.runtime.divergence import Divergence
from puzzle.runtime.model import CausalModel

SEQUENCES, TOKENS, HIDDEN, VOCAB = 3, 37, 40, 301
ENDS = Structure(hidden_size=HIDDEN, vocab_size=VOCAB, max_length=TOKENS, tied=True, norm_eps=1e-5, ropes={}, layers=())


@pytest.fixture(params=["kernel", "plain", "plain in chunks"])
def place(request, device, monkeypatch) -> torch.device:
    """The device of the models; `divergence` may hold a kernel that was imported before the interpreter was asked for."""
    monkeypatch.setattr(divergence, "linear_kl", linear_kl)
    if request.param == "kernel":
        return device
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if request.param == "plain in chunks":
        monkeypatch.setattr(divergence, "Chunks", lambda **k: Chunks(tokens=7, words=VOCAB, **k))
    return torch.device("cpu")


def ends(place, dtype, away=0.0) -> CausalModel:
    """A model without layers and with a tied head, with logits of order 4; `away` from the one with 0."""
    embedding, move = torch.randn(2, VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)) * 4 / HIDDEN**0.5
    norm = torch.linspace(0.8, 1.2 + away, HIDDEN)
    placed = [x.to(place, dtype) for x in (embedding + away * move, norm)]
    return CausalModel(ENDS, placed[0], [], placed[1], None).requires_grad_(False)


def streams(place, dtype, shift=0.3):
    parent, noise = torch.randn(2, SEQUENCES, TOKENS, HIDDEN)
    ids = torch.randint(VOCAB, (SEQUENCES, TOKENS))
    return parent.to(place, dtype), (parent + shift * noise).to(place, dtype), ids.to(place)


def twin(model, parent, child_model, child, ids) -> dict[str, float]:
    log_p, log_q = (
        (m.norm(x).double() @ m.head_weight.double().T).log_softmax(-1)
        for m, x in ((model, parent), (child_model, child))
    )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    loss = -log_q[:, :-1].gather(-1, ids[:, 1:, None])
    return {
        "kl": kl.mean().item(),
        "kl_stderr": kl.mean(dim=1).std().item() / math.sqrt(SEQUENCES),
        "lm_loss": loss.mean().item(),
        "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item(),
        "num_tokens": SEQUENCES * TOKENS,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", ["shared", "equal", "two"])
def test_matches_all_logits_in_float64(place, heads, dtype):
    """Two batches, whose means are those of all sequences together."""
    model, other = ends(place, dtype), ends(place, dtype, away=0.1)
    if heads != "two":
        other.head = model.head_weight if heads == "shared" else torch.nn.Parameter(model.head_weight.clone())
    parent, child, ids = streams(place, dtype)
    meter = Divergence()
    for part in (slice(0, 2), slice(2, None)):
        meter.add(model, parent[part], other, child[part], ids[part])
    assert meter.result() == pytest.approx(twin(model, parent, other, child, ids), abs=1e-6)


def test_bf16(place):
    """Two heads: to rounding in float32. One head: the difference of the hidden states is rounded to bf16."""
    model, other = ends(place, torch.bfloat16), ends(place, torch.bfloat16, away=0.1)
    parent, child, ids = streams(place, torch.bfloat16)
    for own, limit in ((other, 1e-6), (model, 2e-2)):  # 2e-2: two near ties in 189 tokens
        meter = Divergence()
        meter.add(model, parent, own, child, ids)
        assert meter.result() == pytest.approx(twin(model, parent, own, child, ids), rel=limit, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_change_costs_exactly_nothing(place, dtype):
    model = ends(place, dtype)
    parent, _, ids = streams(place, dtype)
    for other in (model, ends(place, dtype)):
        meter = Divergence()
        meter.add(model, parent, other, parent.clone(), ids)
        found = meter.result()
        assert found["kl"] == 0
        assert found["kl_stderr"] == 0
        assert found["top1_agreement"] == 1


def test_not_a_number_is_not_hidden(place):
    model = ends(place, torch.float32)
    parent, child, ids = streams(place, torch.float32)
    child[1, 5, 3] = torch.nan
    meter = Divergence()
    meter.add(model, parent, model, child, ids)
    assert math.isnan(meter.result()["kl"])
