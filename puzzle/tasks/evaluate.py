"""What parent and child can do, side by side: tasks with means, intervals and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from puzzle.base.console import say
from puzzle.base.device import name_of, pick_device
from puzzle.base.errors import UserError, nearest
from puzzle.base.lock import holding_file
from puzzle.base.units import check_positive, check_text
from puzzle.measure.measurable import Measurable
from puzzle.runtime.open import RUN_HERE
from puzzle.tasks import harness, sandbox
from puzzle.tasks.local import SHIPPED, LocalTask, NotReadHere, read_task, shipped
from puzzle.tasks.model import Model
from puzzle.tasks.request import Answers
from puzzle.tasks.statistics import around, difference_interval, mean_interval

MOST_SAMPLES = 1024  # all requests are there at once
Scores = dict[str, dict[str, Any]]  # {task: {metric: a value of each document, or lm-eval's own {"value", "stderr"}}}


@dataclass(kw_only=True, slots=True)
class TaskOptions:
    """tasks: shipped ones with task_data, the directory of their data; files of lm-eval's form; else names that lm-eval has. limit: the
    first documents of each. samples: answers to each request for text, at this temperature; 1 at 0 is greedy. chat: prompts go through
    the chat template, with a system prompt, and thinking "on" or "off" where the template knows it. run_code: what is generated may
    run. precisions: of the child, the first one also of the parent; empty: the usual one, or the child as it was solved for. answers:
    the file that they are kept in."""

    tasks: tuple[str, ...]
    task_data: Path | None = None
    limit: int | None = None
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int | None = None
    chat: bool = False
    system: str | None = None
    thinking: str | None = None
    run_code: bool = False
    precisions: tuple[str, ...] = ()
    answers: Path = Path("answers.jsonl")
    memory_limit: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "limit", "samples", "max_new_tokens", "memory_limit")
        check_text("system", self.system or "")
        if self.samples > MOST_SAMPLES:
            raise UserError(f"`samples` {self.samples} of each answer are too many: give {MOST_SAMPLES} at most")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"`temperature` {self.temperature}: 0 is greedy, more is sampled")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"`samples` {self.samples} are all alike when decoding is greedy: give a `temperature`, such as 0.6"
            )
        for name in ("system", "thinking"):
            if getattr(self, name) is not None and not self.chat:
                raise UserError(f"`{name}` is part of a chat: add `chat`")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"`tasks` {','.join(self.tasks)} has a task twice: leave one out")
        if twice := [one for one in self.precisions if self.precisions.count(one) > 1]:
            raise UserError(f"`precision` {','.join(self.precisions)} has {twice[0]} twice: leave one out")


def evaluate_tasks(
    parent: Measurable, child: Measurable, options: TaskOptions, dry_run: bool = False
) -> dict[str, Any]:
    """{"device", "models": {"parent", "child"} as `Measurable.identity` has them, "options", "sandbox", "tasks": {task: {"documents", "metrics": {metric: {model: {"mean", "low", "high"}}},
    "differences": {"child - parent": {metric: the same}}}}, "cut": {model: requests longer than its context, whose begin was left
    out}}; of a dry run {model: {"requests", "tokens", "seconds"}}. Intervals are of 95 %.

    Raises UserError for unknown tasks, missing data, code that may not run, and models that do not fit whole on the device.
    """
    device = pick_device(options.device)
    local, others = _tasks(options)
    code = [task.name for task in local if task.runs_code]
    if code and not options.run_code and not dry_run:
        raise UserError(f"`tasks` {code[0]} runs generated code: allow it with `run_code`; it then runs in a sandbox")
    _check_used(options, any(task.generates for task in local) or bool(others))
    with ExitStack() as stack:
        if not dry_run:
            stack.enter_context(holding_file(options.answers))
        models = _models(parent, child, device, options, dry_run)
        theirs = harness.load(others) if others else {}
        allowed = sandbox.guarantees() if code and not dry_run else None
        for name, there in (allowed or {}).items():
            if not there:
                say(f"generated code runs without `{name}`: this system allows no such sandbox")
        found = {}
        for model in models:
            found[model.name] = _scores(model, local, theirs, options)
            model.close()
    if dry_run:
        return {model.name: _asked(model) for model in models}
    chosen = {one.name: getattr(options, one.name) for one in fields(options)}
    return {
        "device": name_of(device),
        "models": {"parent": parent.identity(), "child": child.identity()},
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()},
        "tasks": {task: _compared({name: scores[task] for name, scores in found.items()}) for task in found["parent"]},
        "cut": {model.name: len(model.cut) for model in models},
    } | ({} if allowed is None else {"sandbox": allowed})


def _check_used(options: TaskOptions, generates: bool) -> None:
    """generates: whether any task asks for text."""
    given = {
        "samples": options.samples > 1,
        "temperature": options.temperature > 0,
        "max_new_tokens": options.max_new_tokens,
    }
    unused = [name for name, there in given.items() if there and not generates]
    if unused:
        raise UserError(
            f"`{unused[0]}` {getattr(options, unused[0])} is for generated answers, and none of `tasks` "
            f"{','.join(options.tasks)} generates: leave it out"
        )


def _tasks(options: TaskOptions) -> tuple[list[LocalTask], list[str]]:
    """Those that are read here, and the names of those that are lm-eval's."""
    local, others = [], []
    for name in options.tasks:
        own = name in shipped() and options.task_data is not None
        if own or Path(name).suffix in (".yaml", ".yml"):
            path = SHIPPED / f"{name}.yaml" if own else Path(name)
            try:
                local.append(read_task(path, options.task_data, options.limit))
                continue
            except NotReadHere as needed:
                if not harness.installed():
                    raise UserError(f"`tasks` {name} has {needed}, which {harness.NEEDS}") from None
        elif not harness.installed():
            if name in shipped():
                raise UserError(f"`tasks` {name}: give `task_data`, the directory that its data lie in")
            raise UserError(
                f"`tasks` {name}: no shipped task ({nearest(name, shipped())}), and any other {harness.NEEDS}"
            )
        others.append(name)
    names = [task.name for task in local]
    if len(set(names)) < len(names):
        raise UserError(f"`tasks` {','.join(options.tasks)}: two files have one name of a task; change one of them")
    return local, others


def _models(
    parent: Measurable, child: Measurable, device: torch.device, options: TaskOptions, dry_run: bool
) -> list[Model]:
    """The parent, and the child in every precision. What no chat template takes is refused here, before anything is answered."""
    here = RUN_HERE[device.type]
    for precision in options.precisions:
        if precision not in here:
            raise UserError(f"`precisions` {precision} has no runtime on {device.type}: {' and '.join(here)} have")
    several, answers = len(options.precisions) > 1, Answers(options.answers)
    asked = [("parent", parent, (options.precisions or here)[0])]
    asked += [(f"child {one}" if several else "child", child, one) for one in options.precisions or here[:1]]
    models = []
    for name, opened, precision in asked:
        fp8 = None if opened is parent or options.precisions else opened.fp8(device)
        model = Model(name=name, opened=opened, device=device, precision=precision, answers=answers, fp8=fp8)
        model.memory_limit, model.dry = options.memory_limit, dry_run
        if options.thinking is not None:
            if "enable_thinking" not in str(model.tokenizer.chat_template):
                raise UserError(
                    f"`thinking` {options.thinking}: the chat template of {opened.name} knows no enable_thinking; say it in its own words with "
                    "`system`"
                )
            model.chat_settings = {"enable_thinking": options.thinking == "on"}
        if options.chat:
            model.chat([*_system(options), {"role": "user", "content": "?"}])
        models.append(model)
    return models


def _system(options: TaskOptions) -> list[dict[str, str]]:
    return [] if options.system is None else [{"role": "system", "content": options.system}]


def _scores(model: Model, local: Sequence[LocalTask], theirs: dict[str, Any], options: TaskOptions) -> Scores:
    """Of one model; each document's is the mean over the samples."""
    kept = {"temperature": options.temperature, "thinking": options.thinking == "on"}
    rounds = [{"sample": number} | kept for number in range(options.samples)]
    prompt = (lambda messages: model.chat([*_system(options), *messages])) if options.chat else None
    asked = {
        task.name: [
            [task.requests(row, prompt, options.max_new_tokens, **one) for row in task.rows]
            for one in (rounds if task.generates else [{}])
        ]
        for task in local
    }
    flat = [request for each in asked.values() for one in each for requests in one for request in requests]
    answers = dict(zip(flat, model.answer(flat), strict=True))
    found = {}
    for task in local if not model.dry else ():
        told = [[[answers[request] for request in requests] for requests in one] for one in asked[task.name]]
        found[task.name] = _mean([task.scores(one) for one in told])
    if theirs:
        how: dict[str, Any] = {
            "limit": options.limit,
            "apply_chat_template": options.chat,
            "fewshot_as_multiturn": options.chat,
        }
        how |= {"system_instruction": options.system}
        if not options.temperature:
            rounds = [{"sample": 0, "thinking": kept["thinking"]}]  # greedy, or as the task itself says
        every = [harness.evaluate(model, theirs, how, one | {"max_tokens": options.max_new_tokens}) for one in rounds]
        found |= {name: _mean([one[name] for one in every]) for name in theirs}
    return found


def _mean(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over the samples: of each document, or of lm-eval's own values."""
    found: dict[str, Any] = {}
    for metric, first in rounds[0].items():
        each = [one[metric] for one in rounds]
        if isinstance(first, list):
            found[metric] = [sum(values) / len(values) for values in zip(*each, strict=True)]
        else:
            found[metric] = first | {"value": sum(one["value"] for one in each) / len(each)}
    return found


def _compared(scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One task. scores: {model: {metric: a value of each document, or {"value", "stderr"}}}"""
    names = list(scores)
    pairs = [(one, "parent") for one in names[1:]] + [(one, names[1]) for one in names[2:]]
    metrics: dict[str, Any] = {}
    differences: dict[str, dict[str, Any]] = {f"{b} - {a}": {} for b, a in pairs}
    for metric, first in scores["parent"].items():
        each, told = {name: scores[name][metric] for name in names}, metric.removesuffix(",none")
        if isinstance(first, list):
            metrics[told] = {name: mean_interval(values) for name, values in each.items()}
            for b, a in pairs:
                differences[f"{b} - {a}"][told] = difference_interval(each[a], each[b])
        else:
            metrics[told] = {name: around(one["value"], one["stderr"]) for name, one in each.items()}
    documents = next((len(one) for one in scores["parent"].values() if isinstance(one, list)), None)
    return {"documents": documents, "metrics": metrics, "differences": differences}


def _asked(model: Model) -> dict[str, Any]:
    """Of a dry run. seconds: at the pace of the answers that are kept of this model, if any are."""
    lines = [line for line in model.answers.lines.values() if line["model"] == model.told]
    found: dict[str, Any] = {
        "requests": len(model.pending),
        "tokens": sum(len(one.ids) + one.new for one in model.pending),
    }
    seconds = 0.0
    for text in (False, True):
        known = [line for line in lines if isinstance(line["answer"], str) == text]
        tokens = sum(len(one.ids) + one.new for one in model.pending if (not one.scored) == text)
        if tokens and not known:
            return found | {"seconds": None}
        if tokens:
            seconds += tokens * sum(line["seconds"] for line in known) / sum(line["tokens"] for line in known)
    return found | {"seconds": seconds}
