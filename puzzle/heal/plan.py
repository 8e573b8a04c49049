"""What a healing will take, before it starts: time by a few real steps on random tokens, memory and disk by formula."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import repeat
from typing import Any

import torch

from puzzle.base.ranks import running_ranks
from puzzle.data.mixture import Stage
from puzzle.heal.memory import plan_memory
from puzzle.heal.prepare import build_trainer, open_models
from puzzle.heal.settings import HealOptions
from puzzle.heal.train import Trainer

TIMED_STEPS = 3
WARM_UP_STEPS = 4  # two eager ones, the capture of the CUDA graph, a replay
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
        plan = plan_memory(options, stages, models, ranks)
        trainer = build_trainer(options, stages, models, ranks, sharded=plan.sharded, ahead=plan.tokens)
        seconds = sum(_seconds_per_step(trainer, n, stage) * stage.num_steps for n, stage in enumerate(stages))
        trained = trainer.num_trained
        tokens = sum(stage.num_tokens for stage in stages)
        device = ranks.device
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else plan.device_bytes
        exported = sum(t.numel() for _, t in trainer.learner.child.named_weights()) * 2
        return {
            "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
            "processes": ranks.world,
            "parallel": None if ranks.world == 1 else "shards" if plan.sharded else "replicas",
            "dtype": str(models.dtype).removeprefix("torch."),
            "stages": [{**asdict(stage), "num_tokens": stage.num_tokens} for stage in stages],
            "trained_parameters": trained,
            "matching_layers": len(models.pairs),
            "teacher": None if models.teacher is None else plan.taught(stages[0].tokens_per_step // ranks.world),
            "predicted": {
                "num_steps": sum(stage.num_steps for stage in stages),
                "num_tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "peak_memory_bytes": int(peak),
                "host_memory_bytes": plan.host_bytes,
                "disk_bytes": KEPT_CHECKPOINTS * CHECKPOINT_BYTES * trained + exported,
            },
        }


def _seconds_per_step(trainer: Trainer, number: int, stage: Stage) -> float:
    """The mean of TIMED_STEPS steps of one stage on random ids, after warm-up, and with a pass of their own of a streamed teacher,
    which in truth serves more. The weights move: nothing keeps them."""
    generator = torch.Generator().manual_seed(number)
    vocab = len(trainer.learner.child.head_weight)
    rows = stage.batch_size // trainer.ranks.world
    batch = torch.randint(vocab, (2, rows, stage.seq_len), generator=generator)
    warm_ups = WARM_UP_STEPS if trainer.device.type == "cuda" else 1
    trainer.begin_stage(stage.seq_len, repeat(batch, warm_ups))

    def mean_seconds(count: int) -> float:
        begin = time.perf_counter()
        metrics = [trainer.step(batch, 0) for _ in range(count)]
        metrics[-1].tolist()  # waits for the device
        return (time.perf_counter() - begin) / count

    mean_seconds(warm_ups)
    if trainer.streamed is not None:
        trainer.begin_stage(stage.seq_len, repeat(batch, TIMED_STEPS))
    return mean_seconds(TIMED_STEPS)
