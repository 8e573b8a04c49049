"""The modules of training against the plain ones: outputs and gradients; on a GPU in bf16, with attention's own kernels."""

from __future__ import annotations

import pytest
import torch

from puzzle.blocklib.distill import autocast
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import parse_key

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KEYS = (
    "gqa h64 q4 kv4 d16",
    "gqa h64 q4 kv1 d16 o_bias qk_norm=head",
    "gqa h64 q8 kv2 d64 window128",
    "gqa h64 q4 kv2 d16 window7",
    "gqa h64 q4 kv2 d10 window130",
    "gqa h64 q8 kv2 d64 sinks",
    "gqa h64 q4 kv2 d16 window7 sinks",
    "swiglu h64 f96",
    "swiglu h64 f96 bias act=gelu_tanh norm=both norm_offset",
    "linear h64 norm=after",
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [256, 300])
@pytest.mark.parametrize("key", KEYS)
def test_as_the_plain_one(key, num_tokens, device):
    torch.manual_seed(0)
    cuda = device == "cuda"
    sub_block, device = parse_key(key), torch.device(device)
    weights = {n: (0.1 * torch.randn(s) + ("norm" in n)).to(device) for n, s in sub_block.tensors().items()}
    angles = torch.rand(num_tokens, getattr(sub_block, "head_dim", 8) // 2).repeat(1, 2).to(device)
    x = torch.randn(2, num_tokens, 64, device=device)
    upstream, ropes, found = torch.randn_like(x), {"default": (angles.cos(), angles.sin())}, []
    for in_training, wide in ((True, False), (False, True)):
        cast = torch.float64 if wide else torch.bfloat16 if cuda else torch.float32
        part = loaded(sub_block, {n: t.to(cast) for n, t in weights.items()}, in_training)
        part.requires_grad_(True)
        tables = {n: tuple(t.to(cast if wide else torch.float32) for t in pair) for n, pair in ropes.items()}
        entered = x.to(cast).requires_grad_()
        out = part.leave(part.inner(entered, tables))
        grads = torch.autograd.grad(
            out, [entered, *(p for n, p in part.named_parameters() if n != "norm.weight")], upstream.to(cast)
        )
        with torch.no_grad(), autocast(device):
            whole = part.requires_grad_(False)(x.to(cast), tables)
        found.append([out.detach(), whole, *grads])
    for one, other in zip(*found, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < (6e-2 if cuda else 1e-5), f"{error:.1e}"
