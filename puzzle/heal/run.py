"""`puzzle heal`: read, train, keep checkpoints, write the healed child.

One call is one run: it continues the checkpoint that a killed run of the same options left beside --out. What a step
computes depends on its number alone, so the loss curve goes on as if nothing had happened: on the CPU to the last bit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from puzzle import __version__
from puzzle.base.console import Bar, progress, say
from puzzle.base.device import name_of
from puzzle.base.errors import UserError
from puzzle.base.files import claim_output, read_json
from puzzle.base.ranks import Ranks, running_ranks
from puzzle.base.units import seconds_text
from puzzle.data.documents import Source
from puzzle.data.mixture import HealData, Stage, load_data
from puzzle.heal.aligned_teacher import AlignedTeacher
from puzzle.heal.checkpoint import WorkDir
from puzzle.heal.log import Log, read_log, trackers
from puzzle.heal.loss import Seen
from puzzle.heal.memory import plan_memory
from puzzle.heal.on_policy import is_on_policy, on_policy_batch
from puzzle.heal.prepare import Models, blended, build_trainer, open_models
from puzzle.heal.settings import HealOptions
from puzzle.heal.stored_teacher import StoredTeacher
from puzzle.heal.train import METRICS, Trainer
from puzzle.heal.write import write_healed
from puzzle.heal.write_teacher import claim, write_missing

FLUSH_STEPS = 20  # on a GPU; the CPU's numbers are there at once


def read_data(options: HealOptions, stages: list[Stage], models: Models) -> HealData:
    """Of the blend's sources, or of --data as the only one. Raises UserError when there is neither."""
    if options.blend is None and not options.data:
        raise UserError("no data: pass `data` with a directory, a glob or a file, or `blend` with a YAML file")
    plain = Source(name="--data", paths=tuple(options.data), text_field=options.text_field)
    sources = [plain] if options.blend is None else blended(options)
    return load_data(
        sources,
        models.child.directory,
        stages,
        num_validation=options.validation_sequences,
        seed=options.seed,
        allow_repeats=options.allow_repeats,
    )


def heal(options: HealOptions, data: HealData | None = None) -> dict[str, Any]:
    """Heal `options.child` and write it to `options.out`. Returns the record that stands in its heal.json.

    data: what `read_data` returned, to be used again. Raises UserError for bad input before anything is written, and when
    training diverges.
    """
    options.check()
    stages = options.plan_stages()
    with running_ranks(options.device) as ranks:
        return _heal(options, stages, ranks, data)


def _heal(options: HealOptions, stages: list[Stage], ranks: Ranks, data: HealData | None) -> dict[str, Any]:
    models = open_models(options, stages, ranks)
    finished = options.out / "heal.json"
    reads = [options.child, options.teacher, options.teacher_logits, *options.data]
    again = ranks.from_first(lambda: finished.is_file() and not options.force)
    if not again:
        ranks.from_first(lambda: claim_output(options.out, options.force, reads))
    data = data or ranks.from_first(lambda: read_data(options, stages, models))
    for line in data.mixture.report():
        say(
            f"{line['source']}: {line['share']:.1%} of the tokens, {line['epochs']:.2f} epochs of "
            f"{line['available_tokens']:,} tokens",
        )
    stored = None
    if options.teacher_logits is not None:
        stored = claim(options, stages, models, data, ranks)
    aligned = None
    if options.align_tokens and models.teacher is not None:
        aligned = AlignedTeacher(models.child, models.teacher, data)
    told = None if stored is None else stored.facts["teacher"]
    facts = {
        "child": models.child.checkpoint.fingerprint(),
        "teacher": told if models.teacher is None else models.teacher.checkpoint.fingerprint(),
        "data": data.mixture.hash,
        **options.trained_with(stages, str(models.dtype).removeprefix("torch.")),
    }
    work = WorkDir(options.out, ranks)
    if again:
        record = ranks.from_first(lambda: read_json(finished, "puzzle heal"))
        if record.get("run") == facts:
            say(f"{options.out} is healed already: nothing to do")
            work.remove()  # a run killed after its last file was written leaves it
            return record
        ranks.from_first(lambda: claim_output(options.out, options.force, reads))
    if stored is not None:
        write_missing(stored, options, stages, models, data, ranks)
        models = replace(models, teacher=None, pairs=[])
    plan = plan_memory(options, stages, models, ranks)
    tracked = trackers(options.tensorboard, options.wandb, facts) if ranks.is_first else []
    work.claim(facts, options.force)
    if ranks.world > 1:
        say(f"{ranks.world} processes: {'the child in shards' if plan.sharded else 'a replica each'}")
    if plan.tokens is not None:
        taught = plan.taught(stages[0].tokens_per_step // ranks.world)
        say(f"the teacher {taught}")
    tutor = aligned if stored is None else stored
    trainer = build_trainer(options, stages, models, ranks, sharded=plan.sharded, ahead=plan.tokens, tutor=tutor)
    ranks.from_first(lambda: work.check_disk(trainer))
    run = Run(options, stages, data, trainer, work, Log(work.log if ranks.is_first else None, tracked))
    run.train()
    record = ranks.from_first(lambda: run.record(facts, models))
    write_healed(options.out, models.child, trainer, record, work, force=options.force)
    work.remove()
    return record


class Run:
    """The loop over steps: batches, log, evaluation, checkpoints."""

    def __init__(
        self, options: HealOptions, stages: list[Stage], data: HealData, trainer: Trainer, work: WorkDir, log: Log
    ):
        self.options, self.stages, self.data = options, stages, data
        self.trainer, self.ranks, self.work, self.log = trainer, trainer.ranks, work, log
        self.num_steps = sum(stage.num_steps for stage in stages)
        self._pending: list[Tensor] = []  # metrics of the last steps, still on the device
        self._sampled: dict[int, dict[str, float]] = {}  # what is logged of steps on the child's own text
        self._tokens = 0  # trained on, as far as the log goes
        self._flushed = time.monotonic()

    def train(self) -> None:
        """From the newest checkpoint, or the start, to the end. Raises UserError when training diverges."""
        start = self.work.newest()
        if start:
            self.work.load(self.trainer, start)
            say(f"continuing {self.work.path} after step {start} of {self.num_steps}")
        self.log.truncate(start or -1)  # from the start, the first evaluation comes again too
        self._tokens = sum(self._place(step)[0].tokens_per_step for step in range(start))
        say(f"log: {self.work.log}")
        with progress("heal", self.num_steps) as bar:
            bar.advance(start)
            if not start:
                self._evaluate(0)
            self._flushed = time.monotonic()
            for step in range(start, self.num_steps):
                stage, _, inner = self._place(step)
                if step == start or inner == 0:
                    coming = range(step, step - inner + stage.num_steps)
                    self.trainer.begin_stage(stage.seq_len, map(self._batch, coming), self._lessons(step))
                self._pending.append(self.trainer.step(self._own(step), step))
                self._after(step + 1, bar)

    def _batch(self, step: int) -> Tensor:
        """Ids and labels [2, B, T] of this rank."""
        stage, number, inner = self._place(step)
        return self.data.mixture.batch(number, inner, self._rows(stage))

    def _rows(self, stage: Stage) -> slice:
        """This rank's of a step."""
        share = stage.batch_size // self.ranks.world
        return slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)

    def _own(self, step: int) -> Tensor:
        """`_batch`, where this is a step on the child's own text with what it has written."""
        if not is_on_policy(step, self.options.on_policy):
            return self._batch(step)
        stage, child, teacher = self._place(step)[0], self.trainer.learner.child, self.trainer.teacher
        assert teacher is not None
        words = min(len(child.head_weight), len(teacher.model.head_weight))
        first, parts = self._rows(stage).start, self.options.accumulate
        batch, self._sampled[step] = on_policy_batch(
            child, self._batch(step), first, step, self.options.seed, words, parts
        )
        return batch

    def _lessons(self, step: int) -> Iterator[Seen] | None:
        """What a tutor shows of this rank's micro-batches, from `step` to the end of its stage."""
        stage, number, inner = self._place(step)
        kept, steps = self.trainer.tutor, range(inner, stage.num_steps)
        return None if kept is None else kept.lessons(number, steps, self._rows(stage), self.options.accumulate)

    def _place(self, step: int) -> tuple[Stage, int, int]:
        """(stage, its number, step within it)"""
        for number, stage in enumerate(self.stages):
            if step < stage.num_steps:
                return stage, number, step
            step -= stage.num_steps
        raise AssertionError

    def _after(self, done: int, bar: Bar) -> None:
        """Log, evaluate and save when it is time."""
        options, last = self.options, done == self.num_steps
        evaluate = last or bool(options.eval_every and done % options.eval_every == 0)
        save = last or bool(options.save_every and done % options.save_every == 0)
        if evaluate or save or self.ranks.device.type == "cpu" or len(self._pending) >= FLUSH_STEPS:
            self._flush(done, bar)
        bar.advance()
        if evaluate:
            self._evaluate(done)
        if save:
            self.work.save(self.trainer, done)
        if evaluate or save:
            self._flushed = time.monotonic()

    def _flush(self, done: int, bar: Bar) -> None:
        """Bring the pending numbers to the log and look for steps that were skipped."""
        found = [dict(zip(METRICS, values, strict=True)) for values in torch.stack(self._pending).tolist()]
        self._pending = []
        now, steps = time.monotonic(), range(done - len(found), done)
        counts = [self._place(step)[0].tokens_per_step for step in steps]
        rate = sum(counts) / max(1e-9, now - self._flushed)
        self._flushed = now
        used = {"kl": self.options.kl_weight, "cosine": self.options.cosine_weight, "lm": self.options.lm_weight}
        lines = []
        for step, count, metrics in zip(steps, counts, found, strict=True):
            self._tokens += count
            metrics["kl"] /= metrics["compared"] or 1.0
            shown = {
                k: metrics[k] if used.get(k, 1) and math.isfinite(metrics[k]) else None
                for k in ("loss", "kl", "cosine", "lm", "grad_norm")
            }
            lines.append(
                {
                    "step": step + 1,
                    "tokens": self._tokens,
                    **shown,
                    "lr": self.trainer.recipe.lr_at(step),
                    "skipped": int(metrics["skipped"]),
                    "tokens_per_second": round(rate, 1),
                    **self._sampled.pop(step, {}),
                    **({"compared": round(metrics["compared"], 6)} if self.options.align_tokens else {}),
                }
            )
        self.log.write(lines)
        kl = f"  KL {found[-1]['kl']:.4f}" if self.options.kl_weight else ""
        bar.note(f"loss {found[-1]['loss']:.4f}{kl}  {rate:,.0f} tokens/s")
        most = min(self.options.max_skipped, self.num_steps)  # where nothing was learned, a short run has diverged too
        if max(metrics["skipped_in_a_row"] for metrics in found) >= most:
            raise UserError(
                f"{most} steps in a row up to step {done} had a non-finite gradient: "
                f"training diverged; lower `lr` {self.options.lr:g}, or use `dtype` fp32 (log: {self.work.log})"
            )

    def _evaluate(self, step: int) -> None:
        rows = self.data.validation
        tokens_at_once = self.stages[0].tokens_per_step // self.ranks.world // self.options.accumulate
        with watching(self.trainer.learner.child.blocks) as load:
            found = self.trainer.evaluate(rows, max(1, tokens_at_once // rows.shape[2]))
        broken = [name for name, value in found.items() if not math.isfinite(value)]
        if "loss" in broken or (broken and step == self.num_steps):
            name = "loss" if "loss" in broken else broken[0]
            raise UserError(
                f"held-out {name} is {found[name]:g} after step {step}: training diverged; lower `lr` "
                f"{self.options.lr:g} (log: {self.work.log})"
                if step
                else f"held-out {name} of {self.options.child} is {found[name]:g} before any training: its weights are broken"
            )
        told = {"expert_load": load} if load else {}
        self.log.write([{"step": step, "tokens": self._tokens, "held_out": found | dict.fromkeys(broken), **told}])
        kl = "".join(f"{what} {found[name]:.4f}, " for name, what in _divergences(self.options.top_k) if name in found)
        most = max((max(shares) * len(shares) for shares in load.values()), default=0)
        busy = f", busiest expert {most:.1f} x its share" if load else ""
        say(f"step {step}: held-out {kl}loss {found['loss']:.4f}{busy}")

    def record(self, facts: dict[str, Any], models: Models) -> dict[str, Any]:
        """What is told of the run in heal.json, on the card and by --json. All of it is measured; `seconds` is the time of
        all steps, without reading, evaluations and what a killed run lost."""
        lines = read_log(self.work.log)
        steps = [line for line in lines if "skipped" in line]
        before = [0, *(line["tokens"] for line in steps)]
        seconds = sum((s["tokens"] - b) / s["tokens_per_second"] for s, b in zip(steps, before, strict=False))
        held_out = [line for line in lines if "held_out" in line]
        return {
            "run": facts,
            "puzzle": __version__,
            "torch": torch.__version__,
            "device": name_of(self.ranks.device),
            "processes": self.ranks.world,
            "teacher": _name_of(self.trainer.tutor, models),
            "num_steps": self.num_steps,
            "num_tokens": self._tokens,
            "skipped_steps": steps[-1]["skipped"],
            "seconds": round(seconds, 3),
            "sources": self.data.mixture.report(),
            "held_out_tokens": int((self.data.validation[1] >= 0).sum()),
            "before": held_out[0]["held_out"],
            "after": held_out[-1]["held_out"],
            **{name: held_out[-1][name] for name in ("expert_load",) if name in held_out[-1]},
            **self._ways(steps),
        }

    def _ways(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """Of tokens that were compared with another tokenizer's, and of steps on the child's own text."""
        own = [line["sampling_seconds"] for line in steps if "sampling_seconds" in line]
        found = {"on_policy": {"num_steps": len(own), "sampling_seconds": round(sum(own), 3)}} if own else {}
        return found | ({"aligned": self.trainer.tutor.facts} if isinstance(self.trainer.tutor, AlignedTeacher) else {})


@contextlib.contextmanager
def watching(blocks: Iterable[Any]) -> Iterator[dict[str, list[float]]]:
    """By layer of mixtures, the share of this rank's tokens that each expert gets in the forward passes inside; filled in at the end."""
    parts = [(str(index), part) for index, block in enumerate(blocks) for part in block.parts().values()]
    hooks = [part.register_forward_pre_hook(lambda part, given: part.watch(given[0])) for _, part in parts]
    load: dict[str, list[float]] = {}
    try:
        yield load
    finally:
        for hook in hooks:
            hook.remove()
    load |= {index: told["expert_load"] for index, part in parts if (told := part.watched())}


def _divergences(top_k: int | None) -> tuple[tuple[str, str], ...]:
    """Name and words of what an evaluation may hold."""
    aligned = ("kl_aligned", "KL where the tokenizers meet")
    return ("kl", "KL"), ("kl_top", f"KL over the top {top_k} words and the rest"), aligned


def _name_of(tutor: StoredTeacher | AlignedTeacher | None, models: Models) -> str | None:
    if isinstance(tutor, StoredTeacher):
        return str(tutor.facts["name"])
    return None if models.teacher is None else models.teacher.directory.absolute().name


def summary(record: dict[str, Any]) -> str:
    """One line for people."""
    before, after = record["before"], record["after"]
    text = f"held-out loss {before['loss']:.4f} -> {after['loss']:.4f}"
    for name, what in _divergences(record["run"].get("top_k")):
        if name in after:
            if "teacher_loss" in after:
                text += f" (teacher {after['teacher_loss']:.4f})"
            text += f", {what} {before[name]:.4f} -> {after[name]:.4f}"
    sources = ", ".join(f"{s['source']} {s['epochs']:.2f} epochs" for s in record["sources"])
    if "on_policy" in record:
        text += " ({num_steps} steps on its own text, {sampling_seconds:.0f} s of sampling)".format(
            **record["on_policy"]
        )
    return f"{text} after {record['num_tokens']:,} tokens in {seconds_text(record['seconds'])}; {sources}"
