"""What the scripts beside this one share: the two modes, the prompt, and rewards for answers, programs and format."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import click

from puzzle.base.errors import UserError, first_line
from puzzle.base.files import check_writable

MODES = {True: "detailed thinking on", False: "detailed thinking off"}  # the whole system prompt, or its first line
THOUGHT = re.compile(r"<think>(.*?)</think>(.*)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
NO_SANDBOX = (
    "a prompt has `tests`, and a model's program runs in a sandbox alone: pass `sandbox`, such as "
    "'docker run --rm -i --network none --memory 1g python:3.12 python -'"
)
CODE = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


COUNT, SEED = click.IntRange(min=1), click.IntRange(0, 2**32 - 1)


class Script(click.Command):
    """Ends with one line and exit code 2 where input is wrong."""

    def make_context(self, *given: Any, **named: Any) -> click.Context:
        try:
            return super().make_context(*given, **named)
        except click.UsageError as error:
            self.end(error.format_message())

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, OSError) as error:
            self.end(first_line(error))

    def end(self, told: str) -> NoReturn:
        click.echo(f"error: {' '.join(told.split())}", err=True)
        sys.exit(2)


def read_lines(path: Path, out: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a JSONL file. out: what will be written. Raises UserError for a line that is no row, for none, and where both are one."""
    if out is not None and out.resolve() == path.resolve():
        raise UserError(f"`out` {out} is the file that is read: give another")
    try:
        lines, rows = path.read_text(encoding="utf-8").split("\n"), []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number}: no JSON ({error})") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path} line {number}: {line.strip()[:40]} is no JSON object")
    if not rows:
        raise UserError(f"{path} has no rows")
    return rows


def check_same(place: Path, asked: dict[str, Any], what: str) -> None:
    """Raise UserError where `place`, which an earlier call wrote of what it was asked, says something else."""
    found = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    if changed := [name for name, value in asked.items() if found.get(name) != value]:
        raise UserError(f"{what} was made with another {', '.join(changed)}: give another `out`, or remove it")


def is_made(target: Path, record: str, asked: dict[str, Any], part: str = "") -> bool:
    """Whether the checkpoint `target` is there, made of what is asked, as its file `record` says. part: the directory in it of a run that
    is not finished. Raises UserError where it was made of something else, and for a directory that holds other files or cannot be written."""
    if (target / "config.json").is_file():
        check_same(target / record, asked, str(target))
        click.echo(f"{target} is there already")
        return True
    check_writable(target)
    if (target / part / record).is_file():
        check_same(target / part / record, asked, f"{target}, which is not finished,")
    elif target.is_dir() and any(path.name != part for path in target.iterdir()):
        raise UserError(f"`out` {target} is not empty: give another directory")
    return False


def prompt(question: str, thinking: bool) -> list[dict[str, str]]:
    return [{"role": "system", "content": MODES[thinking]}, {"role": "user", "content": question}]


def in_format(text: str, thinking: bool) -> bool:
    """One thought and then an answer when thinking, and no tag otherwise."""
    if not thinking:
        return "<think>" not in text and "</think>" not in text and bool(text.strip())
    found = THOUGHT.fullmatch(text.strip())
    once = text.count("<think>") == text.count("</think>") == 1
    return once and found is not None and all(part.strip() for part in found.groups())


def final_answer(text: str) -> str | None:
    """What stands in the last \\boxed{} after the thought, else the last number there."""
    text = text.rpartition("</think>")[2]
    begin = text.rfind("\\boxed{")
    if begin >= 0:
        depth, start = 0, begin + len("\\boxed{")
        for end in range(start, len(text)):
            if text[end] == "}" and depth == 0:
                return text[start:end]
            depth += {"{": 1, "}": -1}.get(text[end], 0)
    found = NUMBER.findall(text)
    return found[-1] if found else None


def plain(answer: str) -> str:
    """Without what does not change its value: spaces, signs of LaTeX, units in \\text, thousands, `x =`."""
    text = re.sub(r"\\(?:left|right|[,;!: ])|\$|\\?%|\^\\circ|\^\{\\circ\}", "", answer.strip().rstrip("."))
    text = re.sub(r"\\(?:text|mathrm|mbox)\{[^{}]*\}", "", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text.replace(" ", ""))
    return re.sub(r"^[a-zA-Z]=", "", text)


def same_answer(one: str, other: str) -> bool:
    """Equal as numbers, exactly, or else letter by letter once they are `plain`."""
    found = [plain(one), plain(other)]
    try:
        first, second = (Fraction(text) for text in found)
        return first == second
    except (ValueError, ZeroDivisionError):
        return found[0] != "" and found[0] == found[1]


def check_sandbox(rows: list[dict[str, Any]], sandbox: str | None) -> None:
    """Raise UserError for tests without a sandbox, and for one that is not there: before a model has written anything."""
    try:
        words = [] if sandbox is None else shlex.split(sandbox)
    except ValueError as error:
        raise UserError(f"`sandbox` {sandbox}: {error}") from error
    if sandbox is not None and (not words or shutil.which(words[0]) is None):
        raise UserError(f"`sandbox` {sandbox}: no such program here")
    if sandbox is None and any(row.get("tests") for row in rows):
        raise UserError(NO_SANDBOX)


def passes(program: str, tests: str, sandbox: str, seconds: float) -> bool:
    """Whether `sandbox`, a command that runs the Python program on its standard input, ends with 0 in time."""
    process = subprocess.Popen(
        shlex.split(sandbox), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        process.communicate(f"{program}\n{tests}\n", timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    return process.returncode == 0


def is_right(text: str, row: dict[str, Any], sandbox: str | None = None, seconds: float = 10) -> bool:
    """row: `answer`, a maths answer, or `tests`, Python that fails with an error. Raises UserError for tests without a sandbox: what a
    model writes is run nowhere that was not asked for."""
    if row.get("tests"):
        if sandbox is None:
            raise UserError(NO_SANDBOX)
        found = CODE.findall(text.rpartition("</think>")[2])
        return bool(found) and passes(found[-1], row["tests"], sandbox, seconds)
    answer = final_answer(text)
    return answer is not None and same_answer(answer, str(row["answer"]))


def rewards(sandbox: str | None) -> list[Callable[..., list[float]]]:
    """For GRPOTrainer: 1 for a right answer, 1 for the format of the prompt's mode. Rows have `thinking`, `answer` and `tests`."""

    def accuracy(completions: list, answer: list, tests: list, **_: Any) -> list[float]:
        rows = zip(completions, answer, tests, strict=True)
        return [float(is_right(c[0]["content"], {"answer": a, "tests": t}, sandbox)) for c, a, t in rows]

    def format(completions: list, thinking: list, **_: Any) -> list[float]:
        return [float(in_format(c[0]["content"], mode)) for c, mode in zip(completions, thinking, strict=True)]

    return [accuracy, format]
