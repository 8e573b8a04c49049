"""`puzzle evaluate --tasks`: its options, and what people read of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from puzzle.base.errors import UserError
from puzzle.cli import options

OPTIONS = (
    click.option("--tasks", metavar="NAME,…", help="Measure what both can do: tasks by name, or task files (.yaml) of lm-eval's form."),
    click.option("--task-data", type=options.PATH, help="Directory of the data of humaneval, humaneval_instruct, gsm8k, hellaswag, truthfulqa_mc1, which come with puzzle."),
    click.option("--limit", type=int, help="Documents of each task, the first ones. Default: all."),
    click.option("--samples", type=int, default=1, help="Answers to each request for text, whose mean counts."),
    click.option("--temperature", type=float, default=0.0, help="Of these; 0 is greedy."),
    click.option("--max-new-tokens", type=int, help="Of an answer. Default: as the task says."),
    click.option("--chat", is_flag=True, help="Ask through the tokenizer's chat template."),
    click.option("--system", metavar="TEXT", help="System prompt of the chat, such as 'detailed thinking on'."),
    click.option("--thinking", type=click.Choice(["on", "off"]), help="For chat templates that know it; thoughts are no answer."),
    click.option("--run-code", is_flag=True, help="Let generated code run, in a sandbox."),
    click.option("--precision", "precisions", metavar="NAME,…", help="Of the child, e.g. bf16,fp8, side by side."),
    click.option("--answers", type=options.PATH, default=Path("answers.jsonl"), help="File that answers are kept in: the same command goes on from there."),
)  # fmt: skip
NAMES = "task_data limit samples temperature max_new_tokens chat system thinking run_code precisions answers"
SHARED = "tasks parent child library memory_limit device dry_run as_json"  # tasks itself, and what evaluating on text takes too


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All of them."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def evaluate_command(
    parent: str, child: str, library: Path | None, dry_run: bool, as_json: bool, **chosen: Any
) -> None:
    """What the verb does with --tasks."""
    from puzzle.library.assemble import open_child
    from puzzle.measure.measurable import of_checkpoint
    from puzzle.tasks.evaluate import TaskOptions, evaluate_tasks

    if not options.alone():
        raise UserError("`tasks` run in one process: start it without torchrun")
    for name in ("tasks", "precisions"):
        chosen[name] = tuple(part.strip() for part in (chosen[name] or "").split(",") if part.strip())
    if not chosen["tasks"]:
        raise UserError("`tasks` is empty: name a task, such as gsm8k")
    found = evaluate_tasks(of_checkpoint(parent), open_child(child, library), TaskOptions(**chosen), dry_run)
    options.show(lambda: found, as_json, options.print_facts if dry_run else print_tasks)


def print_tasks(found: dict[str, Any]) -> None:
    """A row for each metric: every model's mean and the paired differences, with their intervals."""
    from puzzle.base.console import say
    from puzzle.cli.report import print_table

    models = list(found["cut"])
    differences = list(dict.fromkeys(name for one in found["tasks"].values() for name in one["differences"]))
    rows = [
        [task, metric, one["documents"] or ""]
        + [_told(each[name]) for name in models]
        + [_told(one["differences"][name].get(metric), "+") for name in differences]
        for task, one in found["tasks"].items()
        for metric, each in one["metrics"].items()
    ]
    columns = ("task", "metric", "documents", *models, *differences)
    print_table(f"measured on {found['device']}, with 95 % intervals", columns, rows, words=2)
    for name, count in found["cut"].items():
        if count:
            say(f"{name}: {count} requests are longer than its context, and lost their begin")


def _told(one: dict[str, float] | None, sign: str = "") -> str:
    if one is None:
        return ""
    mean, low, high = one["mean"], one["low"], one["high"]
    return f"{mean:{sign}.3f}" + ("" if low is None else f" [{low:{sign}.3f}, {high:{sign}.3f}]")
