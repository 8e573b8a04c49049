"""Gated DeltaNet by flash-linear-attention: when its kernels are chosen, and what is handed to them. They run on GPUs alone."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from puzzle.blocklib.fast import gated_delta
from puzzle.blocklib.fast.batch import new_batch
from puzzle.blocklib.fast.gated_delta import DeltaInTraining, FastDelta, fla_rules
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import parse_key

GPU, CPU = torch.device("cuda"), torch.device("cpu")
OURS = parse_key("gated_delta h20 kheads2 k5 vheads6 v7 conv3 chunk8")


@pytest.mark.parametrize(
    ("device", "dtype", "key_dim", "version", "chosen"),
    [
        (GPU, torch.bfloat16, 128, "0.4.0", True),
        (GPU, torch.float16, 256, "0.6.1.post1", True),
        (GPU, torch.bfloat16, 128, "0.3.2", False),
        (GPU, torch.bfloat16, 128, "0.7.0", False),
        (GPU, torch.bfloat16, 128, "unknown", False),
        (GPU, torch.bfloat16, 257, "0.5.0", False),
        (GPU, torch.float32, 128, "0.5.0", False),
        (CPU, torch.bfloat16, 128, "0.5.0", False),
    ],
)
def test_when_its_kernels_are_chosen(device, dtype, key_dim, version, chosen, monkeypatch):
    rules = SimpleNamespace(chunk_gated_delta_rule=1, fused_recurrent_gated_delta_rule=2)
    for name, module in (
        ("fla", SimpleNamespace()),
        ("fla.ops", SimpleNamespace()),
        ("fla.ops.gated_delta_rule", rules),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(gated_delta, "version", lambda name: {"fla-core": version}[name])
    gated_delta.installed.cache_clear()
    try:
        assert fla_rules(device, dtype, key_dim) == ((1, 2) if chosen else None)
    finally:
        gated_delta.installed.cache_clear()


def test_without_it():
    assert fla_rules(GPU, torch.bfloat16, 128) is None


@torch.no_grad()
def test_what_it_is_handed(monkeypatch):
    """transformers' functions of the same signature in its place: whole sequences, and a step after them."""

    def like_fla(rule):
        def called(*, q, scale, use_qk_l2norm_in_kernel, **given):
            assert (scale, use_qk_l2norm_in_kernel) == (1.0, False)
            return rule(query=q * q.shape[-1] ** 0.5, key=given.pop("k"), value=given.pop("v"), **given)

        return called

    rules = tuple(map(like_fla, (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule)))
    torch.manual_seed(0)
    weights = {n: torch.randn(s) / s[-1] ** 0.5 for n, s in OURS.tensors().items()}
    plain, x = loaded(OURS, weights), torch.randn(2, 20, 20)
    state = plain.new_state(2, 20, x)
    wanted = [plain(x, {}), plain.prefill(x[:, :19], {}, state), plain.decode(x[:, 19:], {}, state, 19)]
    training = loaded(OURS, weights, in_training=True)
    assert isinstance(training, DeltaInTraining)
    fast = FastDelta(plain, new_batch(2, 20, {}, "cpu"))
    for chosen in (None, rules):
        monkeypatch.setattr(gated_delta, "fla_rules", lambda *given, chosen=chosen: chosen)
        assert torch.allclose(training(x, {}), wanted[0], atol=1e-5)
        mixed = plain.out_proj(fast.part.mixed(plain.in_proj(plain.enter(x[:, :19])), fast.state))
        assert torch.allclose(x[:, :19] + mixed, wanted[1], atol=1e-5)
        step = plain.out_proj(fast.part.stepped(plain.in_proj(plain.enter(x[:, 19:])[:, 0]), fast.state))
        assert torch.allclose(x[:, 19:] + step[:, None], wanted[2], atol=1e-5)
        assert torch.allclose(fast.state.hidden, state.hidden, atol=1e-5)
    assert fast.part.in_proj.weight.data_ptr() == plain.in_proj.weight.data_ptr()
