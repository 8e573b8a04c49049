"""Writing stored teacher logits: the teacher runs once, before a healing, over all that will be trained on (`puzzle/heal/stored_teacher.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from puzzle.base.console import progress, say
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, read_json, write_json
from puzzle.base.ranks import Ranks, held_by_all
from puzzle.base.units import bytes_text
from puzzle.data.mixture import IGNORE, HealData, Stage
from puzzle.data.tokenizer import tokenizer_hash
from puzzle.heal.loss import Teacher, head_losses
from puzzle.heal.memory import micro_batch, plan_memory
from puzzle.heal.prepare import Models, build_teacher
from puzzle.heal.settings import HealOptions
from puzzle.heal.stored_teacher import HELD_OUT, RECORD, StoredTeacher, bytes_per_token
from puzzle.heal.streamed_teacher import StreamedTeacher
from puzzle.heal.top_k import TopK, top_k_of


def write_missing(
    stored: StoredTeacher, options: HealOptions, stages: list[Stage], models: Models, data: HealData, ranks: Ranks
) -> None:
    """Let the teacher write what is not there; nothing of it stays in memory. Raises UserError where there is none."""
    missing = ranks.from_first(lambda: stored.missing)
    if not missing:
        return
    if models.teacher is None:
        raise UserError(
            f"`teacher_logits` {stored.directory} lacks {missing[0].name}: pass `teacher`, which writes the rest"
        )
    each = bytes_per_token(stored.top_k, stored.facts["words"])
    total = each * sum(stage.num_tokens for stage in stages)
    say(
        f"the teacher's top {stored.top_k}: {each} bytes a token, {bytes_text(total)} in {stored.directory}",
    )
    plan = plan_memory(replace(options, parallel="replicas"), stages, models, ranks)
    teacher = build_teacher(models, [], plan.tokens)
    with held_by_all(stored.directory, ranks), torch.no_grad():
        if ranks.is_first:
            write_json(stored.directory / RECORD, {"run": stored.facts})
        teach(stored, teacher, data, ranks, max(1, micro_batch(options, stages, ranks) // stages[0].seq_len))


def facts_of(options: HealOptions, stages: list[Stage], models: Models, data: HealData) -> dict[str, Any]:
    """What the stored numbers depend on, but for the teacher."""
    streams = data.mixture.streams
    return {
        "tokenizer": tokenizer_hash(models.child.directory),
        "texts": content_hash([stream.hash for stream in streams]),
        "shares": [[stream.weight, stream.max_epochs] for stream in streams],
        "seed": options.seed,
        **{name: [getattr(stage, name) for stage in stages] for name in ("seq_len", "batch_size", "num_steps")},
        "held_out": content_hash(data.validation.tolist()),
        "top_k": options.top_k,
        "temperature": options.temperature,
    }


def claim(options: HealOptions, stages: list[Stage], models: Models, data: HealData, ranks: Ranks) -> StoredTeacher:
    """The directory as it was found, or will be written. Raises UserError where it was written for something else, naming what."""
    assert options.teacher_logits is not None
    directory, facts = options.teacher_logits, facts_of(options, stages, models, data)
    vocabulary = models.child.structure.vocab_size
    if models.teacher is not None:
        own = models.teacher.structure.vocab_size
        facts |= {"teacher": models.teacher.checkpoint.fingerprint(), "words": min(own, vocabulary), "vocabulary": own}
        facts["name"] = models.teacher.directory.absolute().name
    record = directory / RECORD
    if directory.resolve().is_relative_to(options.out.resolve()):
        raise UserError(
            f"`teacher_logits` {directory} lies in `out` {options.out}, which is written as a whole: choose another directory"
        )

    def find() -> dict[str, Any]:
        if not record.is_file() and models.teacher is None:
            raise UserError(f"`teacher_logits` {directory} has no {RECORD}: pass `teacher`, which writes it")
        if not record.is_file():
            if directory.is_dir() and any(path.name != ".lock" for path in directory.iterdir()):
                raise UserError(
                    f"`teacher_logits` {directory} holds other things, and no {RECORD}: choose a new directory"
                )
            return facts
        found: dict[str, Any] = read_json(record, "puzzle heal --teacher-logits").get("run", {})
        return found

    found = ranks.from_first(find)
    words = {"words": min(found.get("vocabulary", 0), vocabulary)}
    changed = [name for name in {**facts, **words} if name != "name" and found.get(name) != {**facts, **words}[name]]
    if changed:
        raise UserError(
            f"`teacher_logits` {directory} was written with another {', '.join(changed)}: give the options and data that it was "
            "written with, or another directory"
        )
    if found["top_k"] >= found["words"]:
        raise UserError(f"`top_k` {found['top_k']}: the models share {found['words']} words; keep fewer than that")
    return StoredTeacher(directory, stages, found, ranks.device)


def teach(stored: StoredTeacher, teacher: Teacher, data: HealData, ranks: Ranks, rows_at_once: int) -> None:
    """Write what is missing; every rank its part. rows_at_once: of the first stage."""
    head = teacher.model.head_weight[: stored.facts["words"]]
    missing = ranks.from_first(lambda: {path.name for path in stored.missing})
    todo = [shard for shard in stored.shards if shard.path.name in missing]
    with progress("teacher", -(-len(missing) // ranks.world)) as bar:
        for number, stage in enumerate(stored.stages):
            size = max(1, rows_at_once * stored.stages[0].seq_len // stage.seq_len)
            mine = [shard for shard in todo if shard.stage == number][ranks.rank :: ranks.world]
            batches = (data.mixture.batch(number, step)[0] for shard in mine for step in shard.steps)
            states = shown(teacher, (ids for batch in batches for ids in batch.split(size)), stage.seq_len)
            for shard in mine:
                count = len(shard.steps) * -(-stage.batch_size // size)
                told = [
                    top_k_of(next(states), head, stored.top_k, float(stored.facts["temperature"])) for _ in range(count)
                ]
                stored.write(shard.path, _joined(told))
                bar.advance()
        if HELD_OUT in missing and ranks.is_first:
            _teach_held_out(stored, teacher, data.validation, head, rows_at_once)
            bar.advance()
    ranks.wait()


def _teach_held_out(stored: StoredTeacher, teacher: Teacher, rows: Tensor, head: Tensor, size: int) -> None:
    told, total, labels = [], 0.0, rows[1].flatten().to(head.device)
    states = shown(teacher, rows[0].split(size), rows.shape[2])
    for some, normed in zip(labels.split(size * rows.shape[2]), states, strict=True):
        told.append(top_k_of(normed, head, stored.top_k, 1.0))
        total += float(head_losses(normed, normed, head, None, some, 1.0)[1][some != IGNORE].sum())
    if not math.isfinite(total):
        raise UserError(
            "the `teacher`'s loss on held-out text is not a number: look at its weights, or heal from another one"
        )
    loss = total / int((labels != IGNORE).sum())
    stored.write(stored.directory / HELD_OUT, _joined(told), loss=json.dumps(loss, allow_nan=False))


def shown(teacher: Teacher, ids: Iterable[Tensor], seq_len: int) -> Iterator[Tensor]:
    """The normed last hidden states [R, H] of every part."""
    ropes, device = teacher.model.ropes(seq_len), teacher.model.embedding.weight.device
    if isinstance(teacher, StreamedTeacher):
        yield from (one.normed for one in teacher.ahead(ids, ropes, False))
        return
    for one in ids:
        yield teacher(one.to(device), ropes, False).normed


def _joined(told: list[TopK]) -> TopK:
    words, logs, rest = (torch.cat([getattr(one, name).cpu() for one in told]) for name in ("words", "logs", "rest"))
    return TopK(words=words, logs=logs, rest=rest)
