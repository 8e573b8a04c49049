"""Predict how long a library build takes by timing a few real steps of one layer on this device."""

from __future__ import annotations

import time
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from puzzle.base.device import compute_dtype, wait_for
from puzzle.base.replay import WARM_UP, Replayed
from puzzle.blocklib.distill import VariantTrainer
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import ParentBlock
from puzzle.blocklib.variant import bundles
from puzzle.library.build import Builder
from puzzle.library.plan import BuildPlan, describe, training_flops

NUM_STEPS = 3


def layer_step(builder: Builder) -> tuple[Replayed, Tensor]:
    """A training step of the first layer to train with all its variants, and what enters it [B, T, H]. Weights and activations are
    random of the right shape: nothing is read or written."""
    structure, recipe, device = builder.structure, builder.recipe, builder.device
    dtype, first = compute_dtype(device), min(builder.spaces)
    x = torch.randn(builder.rows, recipe.seq_len, structure.hidden_size, device=device, dtype=dtype)
    ropes = structure.rope_tables(recipe.seq_len, device)
    lr = torch.full((), recipe.lr, device=device)
    parts, trainers = {}, {}
    for slot, sub_block in structure.layers[first].items():
        weights = {n: torch.randn(s, device=device, dtype=dtype) * 0.02 for n, s in sub_block.tensors().items()}
        block = ParentBlock(sub_block=sub_block, weights=weights)
        part = parts[first, slot] = loaded(sub_block, weights, in_training=True)
        block.statistics, block.moments = part.calibrate([x[:1]]), cache(partial(part.moments, [x[:1]], ropes))
        together = bundles(builder.spaces[first][slot], builder.options.nested)
        trainers[first, slot] = [
            VariantTrainer(first, slot, [builder.variant(first, slot, n) for n in names], block, recipe, device, lr)
            for names in together
        ]
    return Replayed(lambda x: builder.through(parts, trainers, ropes, x)), x


def step_seconds(step: Replayed, x: Tensor, num_steps: int = NUM_STEPS) -> float:
    """Mean of `num_steps` steps, after warm-up."""
    for _ in range(WARM_UP + 1):
        step(x)
    wait_for(x.device)
    begin = time.perf_counter()
    for _ in range(num_steps):
        step(x)
    wait_for(x.device)
    return (time.perf_counter() - begin) / num_steps


def predict_seconds(builder: Builder, plan: BuildPlan) -> float:
    """Seconds of all training steps: of a step of one layer, times layers and steps; layers of other kinds count by their FLOPs."""
    structure, recipe = builder.structure, builder.recipe
    flops = {
        i: training_flops(structure.layers[i], space, recipe.seq_len, builder.options.nested)
        for i, space in builder.spaces.items()
    }
    share = plan.longest * sum(flops.values()) / flops[min(builder.spaces)]
    return step_seconds(*layer_step(builder)) * share * recipe.num_steps


def plan_of(builder: Builder) -> dict[str, Any]:
    """What a build would take, for --dry-run."""
    plan = builder.plan()
    return describe(plan, predict_seconds(builder, plan), builder.spaces, str(builder.device))
