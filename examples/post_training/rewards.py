"""What the scripts beside this one share: the two modes, the prompt, and rewards for answers, programs and format."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import click

from puzzle.base.errors import UserError

MODES = {True: "detailed thinking on", False: "detailed thinking off"}  # the whole system prompt, or its first line
THOUGHT = re.compile(r"<think>(.*?)</think>(.*)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
CODE = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)


class Script(click.Command):
    """Ends with one line and exit code 2 where input is wrong."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)


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
            raise UserError(
                "a prompt has `tests`, and a model's program runs in a sandbox alone: pass `sandbox`, such as "
                "'docker run --rm -i --network none --memory 1g python:3.12 python -'"
            )
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
