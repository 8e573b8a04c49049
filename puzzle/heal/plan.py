"""What a healing will take, before it starts: time by a few real steps on random tokens, memory and disk by formula."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import count, repeat
from typing import Any

import numpy as np
import torch

from puzzle.base.device import short_name
from puzzle.base.ranks import Ranks, running_ranks
from puzzle.base.units import bytes_text
from puzzle.data.mixture import Stage
from puzzle.heal.aligned_teacher import AlignedTeacher
from puzzle.heal.checkpoint import disk_bytes
from puzzle.heal.loss import Seen
from puzzle.heal.memory import micro_batch, plan_memory
from puzzle.heal.on_policy import continued, on_policy_steps
from puzzle.heal.prepare import Models, blended, build_teacher, build_trainer, open_models
from puzzle.heal.settings import HealOptions
from puzzle.heal.stored_teacher import bytes_per_token
from puzzle.heal.top_k import TopK, top_k_of
from puzzle.heal.train import Trainer
from puzzle.heal.write_teacher import shown

TIMED_STEPS = 3
WARM_UP_STEPS = 4  # two eager ones, the capture of the CUDA graph, a replay


def plan_heal(options: HealOptions) -> dict[str, Any]:
    """Facts for --dry-run; every number under "predicted" is one. Reads the models, writes nothing.

    Raises UserError as `heal` does for options, models and a blend's file; texts are not looked at.
    """
    options.check()
    if options.blend is not None:
        blended(options)
    stages = options.plan_stages()
    with running_ranks(options.device) as ranks:
        models = open_models(options, stages, ranks)
        tokens = sum(stage.num_tokens for stage in stages)
        taught = None if models.teacher is None else models.teacher.structure.vocab_size
        words, kept, teaching = min(models.child.structure.vocab_size, taught or 2**32), 0, 0.0
        if options.teacher_logits is not None:
            kept = bytes_per_token(options.top_k, words) * (tokens + options.validation_sequences * stages[0].seq_len)
            teaching = _seconds_to_teach(options, stages, models, ranks, words) * tokens / ranks.world
            options = replace(options, cuda_graph=False)
            models = replace(models, teacher=None, pairs=[])
        plan = plan_memory(options, stages, models, ranks)
        aligned = None
        if options.align_tokens and models.teacher is not None:
            aligned = AlignedTeacher(models.child, models.teacher)
        trainer = build_trainer(options, stages, models, ranks, sharded=plan.sharded, ahead=plan.tokens, tutor=aligned)
        top_k = None if options.teacher_logits is None else options.top_k
        times = (_seconds_per_step(trainer, n, stage, top_k) * stage.num_steps for n, stage in enumerate(stages))
        sampling = (
            [_seconds_to_sample(trainer, options, n, stages) for n in range(len(stages))] if options.on_policy else []
        )
        seconds = teaching + sum(times) + sum(sampling)
        trained = trainer.num_trained
        device = ranks.device
        # Of steps alone: what an evaluation takes beside them is in the formula.
        steps = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        return {
            "device": short_name(device),
            "processes": ranks.world,
            "parallel": None if ranks.world == 1 else "shards" if plan.sharded else "replicas",
            "dtype": str(models.dtype).removeprefix("torch."),
            "stages": [{**asdict(stage), "num_tokens": stage.num_tokens} for stage in stages],
            "trained_parameters": trained,
            "matching_layers": len(models.pairs),
            "teacher": _told(options, words, kept)
            or (None if models.teacher is None else plan.taught(stages[0].tokens_per_step // ranks.world)),
            "predicted": {
                "num_steps": sum(stage.num_steps for stage in stages),
                "num_tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(tokens / seconds, 1),
                "peak_memory_bytes": max(steps, plan.device_bytes),
                "host_memory_bytes": plan.host_bytes,
                "teacher_logits_bytes": kept,
                "teacher_seconds": round(teaching, 3),
                "sampling_seconds": round(sum(sampling), 3),
                "disk_bytes": disk_bytes(trainer) + kept,
            },
        }


def _told(options: HealOptions, words: int, kept: int) -> str | None:
    if options.teacher_logits is None:
        return None
    each = bytes_per_token(options.top_k, words)
    return f"runs once, {each} bytes a token, {bytes_text(kept)} in {options.teacher_logits}, then is not there"


def _seconds_to_teach(options: HealOptions, stages: list[Stage], models: Models, ranks: Ranks, words: int) -> float:
    """Per token of one process, by a second micro-batch of random ids; 0 without a teacher, whose directory is then complete."""
    if models.teacher is None:
        return 0.0
    plan = plan_memory(replace(options, parallel="replicas"), stages, replace(models, pairs=[]), ranks)
    teacher = build_teacher(models, [], plan.tokens)
    size = max(1, micro_batch(options, stages, ranks) // stages[0].seq_len)
    ids = torch.randint(words, (size, stages[0].seq_len), generator=torch.Generator().manual_seed(0))
    head = teacher.model.head_weight[:words]
    with torch.no_grad():
        for _ in range(2):
            begin = time.perf_counter()
            [normed] = shown(teacher, [ids], stages[0].seq_len)
            top_k_of(normed, head, options.top_k, options.temperature).rest.tolist()  # waits for the device
    return (time.perf_counter() - begin) / ids.numel()


def _seconds_to_sample(trainer: Trainer, options: HealOptions, number: int, stages: list[Stage]) -> float:
    """Of all steps of a stage on the child's own text, by two lengths after half a row, which is the mean prompt."""
    child, stage, before = trainer.learner.child, stages[number], sum(s.num_steps for s in stages[:number])
    own = on_policy_steps(before + stage.num_steps, options.on_policy) - on_policy_steps(before, options.on_policy)
    rows, half = stage.batch_size // trainer.ranks.world, max(1, stage.seq_len // 2)
    ids = torch.zeros(rows, stage.seq_len, dtype=torch.long)
    few, more = (min(stage.seq_len - half, tokens) for tokens in (2, 18))

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        continued(child, ids[:, : half + tokens], half, [0] * rows, len(child.head_weight), trainer.accumulate).tolist()
        return time.perf_counter() - begin

    seconds(few)
    short, longer = seconds(few), seconds(more)
    each = max(0.0, longer - short) / max(1, more - few)
    return own * (short + each * (stage.seq_len - half - few))


def _seconds_per_step(trainer: Trainer, number: int, stage: Stage, top_k: int | None) -> float:
    """top_k: words of a stored teacher. The mean of TIMED_STEPS steps of one stage on random ids, after warm-up, and with a pass of their own of a streamed teacher,
    which in truth serves more. The weights move: nothing keeps them."""
    generator = torch.Generator().manual_seed(number)
    vocab = len(trainer.learner.child.head_weight)
    rows = stage.batch_size // trainer.ranks.world
    batch = torch.randint(vocab, (2, rows, stage.seq_len), generator=generator)
    warm_ups = WARM_UP_STEPS if trainer.device.type == "cuda" else 1
    lessons: Iterator[Seen] | None = None
    if top_k is not None:
        each = rows // trainer.accumulate * stage.seq_len
        logs = torch.full((each, top_k + 1), -math.log(top_k + 1), device=trainer.device)
        told = TopK(words=torch.arange(top_k, device=trainer.device).repeat(each, 1), logs=logs[:, 1:], rest=logs[:, 0])
        lessons = repeat(told)
    if isinstance(trainer.tutor, AlignedTeacher):
        tutor, length = trainer.tutor, min(stage.seq_len, trainer.tutor.longest)
        row = batch[0, 0, :length].numpy() % len(tutor.head), np.arange(stage.seq_len).clip(max=length - 1)
        lessons = (tutor.show([row] * (rows // trainer.accumulate)) for _ in count())
    trainer.begin_stage(stage.seq_len, repeat(batch, warm_ups), lessons)

    def mean_seconds(steps: int) -> float:
        begin = time.perf_counter()
        metrics = [trainer.step(batch, 0) for _ in range(steps)]
        metrics[-1].tolist()  # waits for the device
        return (time.perf_counter() - begin) / steps

    mean_seconds(warm_ups)
    if trainer.streamed is not None:
        trainer.begin_stage(stage.seq_len, repeat(batch, TIMED_STEPS))
    return mean_seconds(TIMED_STEPS)
