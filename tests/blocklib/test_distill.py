"""A trainer's steps against autograd, torch's clipping and AdamW on the module as it is written down, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from puzzle.blocklib import distill
from puzzle.blocklib.distill import Recipe, Shown, VariantTrainer
from puzzle.blocklib.plain.part import RMSNorm, loaded
from puzzle.blocklib.sub_block import ParentBlock, parse_key
from puzzle.blocklib.variant import bundles, search_space, variant_of
from puzzle.kernels.block_loss import block_loss_reference

RECIPE = Recipe(num_steps=4, batch_size=2, seq_len=24, lr=1e-2, weight_decay=0.1, clip_norm=0.5)
ATTENTION = "gqa h32 q4 kv4 d8"
PARENTS = (
    ATTENTION,
    f"{ATTENTION} qkv_bias o_bias qk_norm=head",
    f"{ATTENTION} norm=both norm_offset residual=0.4",
    f"{ATTENTION} norm=after qk_norm=all rope=none",
    "swiglu h32 f64",
    "swiglu h32 f64 bias act=gelu_tanh norm=both",
    "swiglu h32 f64 norm=after",
    "relu2 h32 f64",
    "relu2 h32 f64 bias norm=both",
    "mamba2 h32 heads4 d5 groups2 state6 conv3 chunk7",
    "mamba2 h32 heads4 d5 groups2 state6 bias norm=both residual=0.4",
    "gated_delta h32 kheads2 k5 vheads4 v6 conv3 chunk7",
)
MIXTURES = (  # whose norms train through autograd
    "moe h32 e6 k2 f20 shared17 shared_gate norm_topk norm=both",
    "moe h32 e6 k2 f20 act=relu2 router=sigmoid correction_bias scaling=2.5",
)
MORE = {
    "gqa": "window-7,kv2,linear,linear-5,none",
    "mamba2": "heads2,dim3,linear,linear-5,none",
    "gated_delta": "linear,none",
    "moe": "experts=3,width=0.8,none",
}  # variants of a kind


def parent_of(key: str) -> tuple[ParentBlock, dict, torch.Tensor]:
    torch.manual_seed(0)
    sub_block = parse_key(key)
    weights = {n: 0.3 * torch.randn(s).double() + ("norm" in n) for n, s in sub_block.tensors().items()}
    angles = torch.rand(24, 4).double().repeat(1, 2)
    block, ropes = ParentBlock(sub_block=sub_block, weights=weights), {"default": (angles.cos(), angles.sin())}
    x = torch.randn(2, 24, 32).double()
    part = loaded(sub_block, weights)
    block.statistics, block.moments = part.calibrate([x]), lambda: part.moments([x], ropes)
    return block, ropes, x


def norm(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Without the float32 inside, whose rounding AdamW makes large where a gradient is nearly zero."""
    return F.rms_norm(x, (x.shape[-1],), self.weight + self.offset, self.eps)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", PARENTS + MIXTURES)
def test_steps_are_those_of_the_module(key, nested, monkeypatch):
    monkeypatch.setattr(RMSNorm, "forward", norm)
    monkeypatch.setattr(distill, "compute_dtype", lambda device: torch.float64)
    block, ropes, x = parent_of(key)
    target = loaded(block.sub_block, block.weights)(x, ropes)
    more = MORE.get(block.sub_block.kind, "0.75,0.25,none" if "norm=after" in key else "0.75,0.25,linear,none")
    space = search_space(block.sub_block, more)
    for names in bundles(space, nested):
        variants = [variant_of(block.sub_block, name) for name in names]
        trainer = VariantTrainer(0, "slot", variants, block, RECIPE, torch.device("cpu"), torch.tensor(1e-2))
        start = variants[-1].initialise(block)
        plain = loaded(variants[-1].sub_block, {n: t.double() for n, t in start.items()}).requires_grad_(True)
        optimizer = (
            torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1) if start else None
        )
        for _ in range(RECIPE.num_steps):
            shown = Shown(loaded(block.sub_block, block.weights), x, ropes)
            trainer.step(shown)
            torch.testing.assert_close(shown.target, target)
            if optimizer is not None:
                optimizer.zero_grad()
                outputs = plain.prefixes(plain.enter(x), ropes, trainer.sub_blocks)
                sum(block_loss_reference(out, target) for out in outputs).backward()
                torch.nn.utils.clip_grad_norm_(plain.parameters(), RECIPE.clip_norm)
                optimizer.step()
        for name, value in trainer.masters.values().items():
            torch.testing.assert_close(value, dict(plain.named_parameters())[name].detach(), rtol=1e-7, atol=1e-7)
        trainer.validate(shown)
        outputs = plain.prefixes(plain.enter(x), ropes, trainer.sub_blocks)
        wanted = torch.stack([block_loss_reference(out, target) for out in outputs]).double()
        torch.testing.assert_close(trainer.validated(), wanted.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("key", PARENTS)
def test_flops_of_training(key):
    """A third of the products is a forward pass, a third the weights' gradients, and only what reads no input has more."""
    sub_block, context = parse_key(key), 12.5
    matrices = {n: a * b for n, s in sub_block.tensors().items() if len(s) == 2 for a, b in [s]}
    last = sum(size for n, size in matrices.items() if n in ("o_proj.weight", "down_proj.weight", "out_proj.weight"))
    convolved = sum(math.prod(s) for s in sub_block.tensors().values() if len(s) == 3)
    wanted = 4 * sum(matrices.values()) + 2 * last + 6 * convolved + 3 * sub_block.mixing_flops(context)
    assert sub_block.training_flops(context) == wanted
    linear = parse_key("linear h32")
    assert linear.training_flops(context) == 4 * 32 * 32
    wider = replace(linear, hidden_size=64)
    assert wider.training_flops(1) == 4 * linear.training_flops(1)
    for key in MIXTURES:
        assert parse_key(key).training_flops(1) == 3 * parse_key(key).flops(1, 1)
