"""Predict how long a library build takes by timing a few real steps of one layer on this device."""

from __future__ import annotations

import time

import torch

from puzzle.base.device import compute_dtype
from puzzle.base.replay import WARM_UP, Replayed
from puzzle.blocklib.distill import VariantTrainer, calibrate
from puzzle.blocklib.layer import KINDS, ParentLayer, attention_shapes, ffn_shapes, rope_tables
from puzzle.blocklib.variant import PARENT, parse_variant
from puzzle.library.build import Builder
from puzzle.library.plan import BuildPlan
from puzzle.runtime.model import parent_module

NUM_STEPS = 3


def predict_seconds(builder: Builder, plan: BuildPlan) -> float:
    """Seconds of all training steps: the mean of NUM_STEPS steps of one layer, after warm-up,
    times layers and steps. Weights and activations are random of the right shape: nothing is read or written."""
    spec, recipe, device = builder.spec, builder.recipe, builder.device
    dtype = compute_dtype(device)
    shapes = {"attention": attention_shapes(spec), "ffn": ffn_shapes(spec)}
    weights = {
        kind: {n: torch.randn(s, device=device, dtype=dtype) * 0.02 for n, s in shapes[kind].items()} for kind in KINDS
    }
    layer = ParentLayer(index=0, spec=spec, attention=weights["attention"], ffn=weights["ffn"])
    attention, ffn = (parent_module(kind, spec, weights[kind]) for kind in KINDS)
    x = torch.randn(recipe.batch_size, recipe.seq_len, spec.hidden_size, device=device, dtype=dtype)
    rope = rope_tables(spec, recipe.seq_len, device)
    layer.calibration = calibrate(ffn, [x[:1]], spec)  # type: ignore[arg-type]
    lr = torch.full((), recipe.lr, device=device)
    trainers = [
        VariantTrainer(layer, kind, parse_variant(kind, name, spec), recipe, device, lr)
        for kind in KINDS
        for name in builder.variants[kind]
        if name != PARENT
    ]
    step = Replayed(lambda x: builder.train_layer(x, attention, ffn, trainers, rope))
    for _ in range(WARM_UP + 1):
        step(x)
    _wait(device)
    begin = time.perf_counter()
    for _ in range(NUM_STEPS):
        step(x)
    _wait(device)
    seconds = (time.perf_counter() - begin) / NUM_STEPS
    return seconds * len(builder.layers) * recipe.num_steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
