"""What a healing will take, before it starts: time by a few real steps on random tokens, memory and disk by formula.

Letters: P trained parameters, Q frozen ones, R tokens of a micro-batch, H hidden_size, F the widest FFN.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch

from puzzle.base.ranks import running_ranks
from puzzle.data.mixture import Stage
from puzzle.heal.prepare import build_trainer, open_models
from puzzle.heal.settings import HealOptions
from puzzle.heal.train import Trainer

TIMED_STEPS = 3
WARM_UP_STEPS = 4  # two eager ones, the capture of the CUDA graph, a replay
MASTER_BYTES = 16  # per trained parameter: float32 weight, gradient and two moments
CHECKPOINT_BYTES = 12  # per trained parameter: weight and two moments
KEPT_CHECKPOINTS = 2  # the newest, and the one being written


def plan_heal(options: HealOptions) -> dict[str, Any]:
    """Facts for --dry-run; every number under "predicted" is one. Reads the models, writes nothing.

    Raises UserError as `heal` does for options and models; data are not looked at.
    """
    options.check()
    stages = options.plan_stages()
    with running_ranks(options.device) as ranks:
        models = open_models(options, stages, ranks)
        trainer = build_trainer(options, stages, models, ranks)
        seconds = sum(_seconds_per_step(trainer, n, stage) * stage.num_steps for n, stage in enumerate(stages))
        trained = sum(p.numel() for p in trainer.parts)
        tokens = sum(stage.num_tokens for stage in stages)
        device = ranks.device
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _memory(trainer, stages, options)
        exported = sum(t.numel() for _, t in trainer.learner.child.named_weights()) * 2
        return {
            "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
            "processes": ranks.world,
            "dtype": str(models.dtype).removeprefix("torch."),
            "stages": [{**asdict(stage), "num_tokens": stage.num_tokens} for stage in stages],
            "trained_parameters": trained * ranks.world,
            "matching_layers": len(models.pairs),
            "predicted": {
                "num_steps": sum(stage.num_steps for stage in stages),
                "num_tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "peak_memory_bytes": int(peak),
                "disk_bytes": KEPT_CHECKPOINTS * CHECKPOINT_BYTES * trained * ranks.world + exported,
            },
        }


def _seconds_per_step(trainer: Trainer, number: int, stage: Stage) -> float:
    """The mean of TIMED_STEPS steps of one stage on random ids, after warm-up. The weights move: nothing keeps them."""
    generator = torch.Generator().manual_seed(number)
    vocab = len(trainer.learner.child.head_weight)
    rows = stage.batch_size // trainer.ranks.world
    batch = torch.randint(vocab, (2, rows, stage.seq_len), generator=generator)
    trainer.begin_stage(stage.seq_len)

    def mean_seconds(count: int) -> float:
        begin = time.perf_counter()
        metrics = [trainer.step(batch, 0) for _ in range(count)]
        metrics[-1].tolist()  # waits for the device
        return (time.perf_counter() - begin) / count

    mean_seconds(WARM_UP_STEPS if trainer.device.type == "cuda" else 1)
    return mean_seconds(TIMED_STEPS)


def _memory(trainer: Trainer, stages: list[Stage], options: HealOptions) -> float:
    """MASTER_BYTES · P + bytes of Q + R · (layers · saved + 3 · V) · bytes of an element.

    saved per token and layer: 8 H + 4 F of a block's activations (2 H when they are recomputed), H of the teacher's state.
    """
    child, size = trainer.learner.child, trainer.dtype.itemsize
    trained = sum(p.numel() for p in trainer.parts)
    teacher = 0 if trainer.teacher is None else sum(p.numel() for p in trainer.teacher.parameters())
    hidden = child.structure.hidden_size
    sides = [side for *_, part in child.parts() for p in part.parameters() if p.ndim > 1 for side in p.shape]
    rows = max(s.batch_size * s.seq_len for s in stages) // options.accumulate // trainer.ranks.world
    saved = 2 * hidden if options.recompute else 8 * hidden + 4 * max(sides, default=0)
    per_token = len(child.blocks) * (saved + hidden) * size
    logits = 6 * min(rows * len(child.head_weight), 2**24) * 4
    return MASTER_BYTES * trained + teacher * size + rows * per_token + logits
