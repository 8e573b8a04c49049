"""Tasks from a YAML file of lm-eval's form and local data, read here: choices by log-likelihood, exact match of what a regular
expression finds in an answer, and code by its unit tests. What the file asks for besides is lm-eval's."""

from __future__ import annotations

import ast
import gzip
import json
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from puzzle.base.errors import UserError, first_line
from puzzle.base.files import parse_json
from puzzle.base.yaml_text import parse_yaml
from puzzle.tasks import sandbox
from puzzle.tasks.form import entries, wrong_form
from puzzle.tasks.request import Answer, Request

SHIPPED = Path(__file__).parent / "shipped"
READ = {  # keys of a file; of those that lie within another, its name first
    "task", "tag", "dataset_path", "dataset_kwargs", "test_split", "output_type", "unsafe_code", "doc_to_text", "doc_to_target",
    "doc_to_choice", "target_delimiter", "fewshot_delimiter", "fewshot_config", "num_fewshot", "generation_kwargs", "metric_list",
    "filter_list", "repeats", "metadata",
    "dataset_kwargs data_files", "fewshot_config sampler", "fewshot_config samples", "generation_kwargs until",
    "generation_kwargs max_gen_toks", "generation_kwargs do_sample", "generation_kwargs temperature", "metric_list metric",
    "metric_list aggregation", "metric_list higher_is_better", "metric_list ignore_case", "metric_list ignore_punctuation",
    "metric_list regexes_to_ignore", "filter_list name", "filter_list filter",
}  # fmt: skip
METRICS = {"multiple_choice": ("acc", "acc_norm"), "generate_until": ("exact_match", "pass@1")}
Row = Mapping[str, Any]
Prompt = Callable[[list[dict[str, str]]], str]  # messages -> what the model reads

_environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_template = cache(_environment.from_string)  # rows of a task share theirs
_environment.filters["regex_replace"] = lambda text, pattern, by, count=0: re.sub(pattern, by, text, count=count)


class NotReadHere(Exception):
    """What of a file only lm-eval knows."""


@dataclass(kw_only=True)
class LocalTask:
    """config: as the file has it. rows: its documents."""

    name: str
    config: Mapping[str, Any]
    rows: Sequence[Row] = field(repr=False)

    @property
    def generates(self) -> bool:
        return self.config["output_type"] == "generate_until"

    @property
    def runs_code(self) -> bool:
        return any(metric["metric"] == "pass@1" for metric in self.config["metric_list"])

    def render(self, name: str, row: Row) -> str:
        """The row's column of that name, as lm-eval has it, else the template with the row's values."""
        asked = self.config[name]
        if isinstance(asked, str) and asked in row:
            return str(row[asked])
        try:
            return _template(str(asked)).render(**row)
        except Exception as error:  # whatever its expressions raise
            raise UserError(
                f"task {self.name}: `{name}` does not fit a row of its data ({first_line(error)}; the row has {', '.join(row)})"
            ) from error

    def choices(self, row: Row) -> list[str]:
        asked = self.config["doc_to_choice"]
        found = asked
        if isinstance(asked, str):
            try:
                found = row[asked] if asked in row else ast.literal_eval(self.render("doc_to_choice", row))
            except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
                found = None
        found = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(found, list) or not found:
            raise UserError(f"task {self.name}: `doc_to_choice` gives no list of choices for {dict(row)}")
        return [str(one) for one in found]

    def right(self, row: Row) -> int:
        """Which choice is: by its number, or by its text."""
        told, choices = self.render("doc_to_target", row), self.choices(row)
        column = row.get(self.config["doc_to_target"])
        by_text = isinstance(column, str) or re.fullmatch("[0-9]{1,9}", told) is None
        number = (choices.index(told) if told in choices else -1) if by_text else int(told)
        if not 0 <= number < len(choices):
            raise UserError(f"task {self.name}: the right answer is {told!r} of {len(choices)} choices in {dict(row)}")
        return number

    def check(self) -> None:
        """Everything that no answer decides, of every row, before there are any. Raises UserError."""
        for name in ("doc_to_text", "doc_to_target", *(() if self.generates else ("doc_to_choice",))):
            if name not in self.config:
                raise UserError(f"task {self.name} has no `{name}`: its file says with it what a row asks")
            if not isinstance(self.config[name], (str, int, list, dict) if name == "doc_to_choice" else (str, int)):
                raise UserError(f"task {self.name}: `{name}` {self.config[name]!r} is no text")
        for step in (step for one in self.config.get("filter_list") or [] for step in one["filter"]):
            if step["function"] == "regex":
                self._compiled("regex_pattern", step["regex_pattern"])
        for pattern in self.config["metric_list"][0].get("regexes_to_ignore") or []:
            self._compiled("regexes_to_ignore", pattern)
        _ = self.shots
        by_length = any(one["metric"] == "acc_norm" for one in self.config["metric_list"])
        for row in self.rows:
            question, wanted = self.render("doc_to_text", row), self.render("doc_to_target", row)
            if self.runs_code and not isinstance(row.get("prompt"), str):
                raise UserError(
                    f"task {self.name}: pass@1 completes the text in the column `prompt`; a row has {', '.join(row)}"
                )
            if self.generates:
                if not self.runs_code and wanted.startswith("[") and wanted.endswith("]"):
                    raise UserError(
                        f"task {self.name}: `doc_to_target` gives the list {wanted}: one right answer is read here"
                    )
                continue
            self.right(row)
            if question.isdigit():
                raise UserError(f"task {self.name}: `doc_to_text` gives {question}, which lm-eval takes for a number")
            if by_length and "" in self.choices(row):
                raise UserError(
                    f"task {self.name}: acc_norm divides by a choice's length, and one is empty in {dict(row)}"
                )

    def _compiled(self, name: str, pattern: Any) -> None:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"task {self.name}: `{name}` {pattern!r} is no regular expression ({error})") from error

    @cached_property
    def shots(self) -> list[tuple[str, str]]:
        """Questions and answers that stand before every question."""
        samples = (self.config.get("fewshot_config") or {}).get("samples") or []
        samples = samples[: self.config.get("num_fewshot") or 0]
        return [(self.render("doc_to_text", one), self.render("doc_to_target", one)) for one in samples]

    def requests(
        self, row: Row, prompt: Prompt | None, max_tokens: int | None = None, **settings: Any
    ) -> list[Request]:
        """prompt: the chat template; None: plain text. max_tokens: instead of the file's. settings: of every generation."""
        question, delimiter = self.render("doc_to_text", row), self.config.get("target_delimiter", " ")
        if prompt is None:
            between = self.config.get("fewshot_delimiter", "\n\n")
            context = "".join(f"{text}{delimiter}{answer}{between}" for text, answer in self.shots) + question
        else:
            said = [
                {"role": role, "content": one}
                for shot in self.shots
                for role, one in zip(("user", "assistant"), shot, strict=True)
            ]
            context, delimiter = prompt([*said, {"role": "user", "content": question}]), ""
        if not self.generates:
            return [Request(context=context, continuation=delimiter + choice) for choice in self.choices(row)]
        asked = self.config.get("generation_kwargs") or {}
        until = asked.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        return [
            Request(context=context, until=until, max_tokens=max_tokens or asked.get("max_gen_toks", 256), **settings)
        ]

    def scores(self, answers: Sequence[Sequence[Answer]]) -> dict[str, list[float]]:
        """By metric and filter, as lm-eval names them, of each document. answers: to `requests` of each document."""
        if self.runs_code:
            programs = [self.program(row, one[0]) for row, one in zip(self.rows, answers, strict=True)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return {"pass@1,none": [float(passed) for passed, _ in pool.map(sandbox.run, programs)]}
        if self.generates:
            return {
                f"exact_match,{one['name']}": [
                    float(self.same(_filtered(answer[0], one["filter"]), self.render("doc_to_target", row)))
                    for row, answer in zip(self.rows, answers, strict=True)
                ]
                for one in self.config.get("filter_list") or [{"name": "none", "filter": []}]
            }
        found: dict[str, list[float]] = {}
        for metric in self.config["metric_list"]:
            values = found.setdefault(f"{metric['metric']},none", [])
            for row, each in zip(self.rows, answers, strict=True):
                lengths = [len(choice) if metric["metric"] == "acc_norm" else 1 for choice in self.choices(row)]
                likely = [value / length for (value, _), length in zip(each, lengths, strict=True)]
                values.append(float(likely.index(max(likely)) == self.right(row)))
        return found

    def same(self, found: str, wanted: str) -> bool:
        rules = self.config["metric_list"][0]
        for pattern in rules.get("regexes_to_ignore") or []:
            found, wanted = re.sub(pattern, "", found), re.sub(pattern, "", wanted)
        if rules.get("ignore_case"):
            found, wanted = found.lower(), wanted.lower()
        if rules.get("ignore_punctuation"):
            found, wanted = (text.translate(str.maketrans("", "", string.punctuation)) for text in (found, wanted))
        return found == wanted

    def program(self, row: Row, answer: str) -> str:
        """The answer and its tests. Of an answer in prose the last fenced part counts; it completes the prompt or stands for itself."""
        fenced = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", answer, re.DOTALL)
        code = fenced[-1] if fenced else answer.partition("```")[0]
        begin = row["prompt"] + ("\n" if re.search(r"^(def|import|from) ", code, re.MULTILINE) else "")
        return f"{begin}{code}\n{self.render('doc_to_target', row)}"


def _filtered(answer: str, steps: Sequence[Mapping[str, Any]]) -> str:
    """As lm-eval's filter `regex` does."""
    for step in steps:
        if step["function"] == "regex":
            found = re.findall(step["regex_pattern"], answer)
            group = step.get("group_select", 0)
            one = found[group] if -len(found) <= group < len(found) else ""
            one = next((part for part in one if part), "") if isinstance(one, tuple) else one
            answer = one.strip() if one else step.get("fallback", "[invalid]")
    return answer


def shipped() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_task(path: Path, data: Path | None, limit: int | None) -> LocalTask:
    """data: directory that the file's data lie in; None: beside it. Raises NotReadHere for what only lm-eval knows, UserError for a broken
    file and for missing data."""
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise NotReadHere(f"{first_line(error)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"`tasks` {path} cannot be read ({first_line(error)}): give a task file of lm-eval's form"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise UserError(f"`tasks` {path} has no `task: NAME`: give a task file of lm-eval's form")
    try:
        _check_read(config)
        wrong = wrong_form(config)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"`tasks` {path} is not of lm-eval's form ({type(error).__name__}: {error})") from error
    if wrong is not None:
        raise UserError(f"`tasks` {path}: {wrong}")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    files = files.get(config.get("test_split")) if isinstance(files, dict) else files
    if config.get("dataset_path") != "json" or not files:
        raise NotReadHere("data that are not `dataset_path: json` with `data_files` of its test_split")
    rows = read_rows(
        config["task"], [files] if isinstance(files, str) else files, data or path.parent, data is not None
    )
    task = LocalTask(name=config["task"], config=config, rows=rows[:limit])
    task.check()
    return task


def _check_read(config: Mapping[str, Any]) -> None:
    keys = set(config) | {f"{name} {key}" for name, one in entries(config) for key in one}
    if unknown := sorted(keys - READ):
        raise NotReadHere(f"`{unknown[0]}`")
    kind, metrics = config.get("output_type"), [one.get("metric") for one in config.get("metric_list") or [{}]]
    if kind not in METRICS:
        raise NotReadHere(f"`output_type: {kind}`")
    if unknown := [str(one) for one in metrics if one not in METRICS[kind]]:
        raise NotReadHere(f"`metric: {unknown[0]}`")
    if kind == "generate_until" and len(metrics) > 1:
        raise NotReadHere("several metrics of one answer")
    steps = [step for one in config.get("filter_list") or [] for step in one["filter"]]
    if unknown := [step["function"] for step in steps if step["function"] not in ("regex", "take_first")]:
        raise NotReadHere(f"the filter `{unknown[0]}`")
    if unknown := sorted(
        {key for step in steps for key in step} - {"function", "regex_pattern", "group_select", "fallback"}
    ):
        raise NotReadHere(f"`{unknown[0]}` of a filter")
    if (config.get("num_fewshot") or 0) > len((config.get("fewshot_config") or {}).get("samples") or []):
        raise NotReadHere("`num_fewshot` without as many samples of its `fewshot_config`")
    if (config.get("repeats") or 1) != 1 or (config.get("generation_kwargs") or {}).get("do_sample"):
        raise NotReadHere("`repeats` and `do_sample`")


def read_rows(task: str, patterns: Sequence[str], directory: Path, given: bool) -> list[Row]:
    """Of the first pattern that a file has, in the directory; as a path by itself, or from where we are, where the directory has none. given:
    whether the user named the directory, and then nowhere else but in a path by itself. Raises UserError for none, for several, and for one that is
    no table of JSON."""
    for pattern in patterns:
        try:
            found = sorted(directory.glob(pattern.lstrip("/")))
            if not found and Path(pattern).is_file() and (Path(pattern).is_absolute() or not given):
                found = [Path(pattern)]
        except (ValueError, IndexError, NotImplementedError) as error:
            raise UserError(
                f"task {task}: {pattern!r} names no file of its data ({error}): give the file's name"
            ) from error
        if len(found) > 1:
            raise UserError(
                f"task {task}: {found[0]} and {found[1]} are both its data: give a directory with one of them"
            )
        if found:
            break
    else:
        fix = "another `task_data`" if given else "`task_data` with the directory that has it"
        raise UserError(f"task {task}: no {' or '.join(patterns)} under {directory}: give {fix}")
    try:
        opened = gzip.open if found[0].suffix == ".gz" else open
        with opened(found[0], "rt", encoding="utf-8") as handle:
            text = handle.read()
        rows = (
            parse_json(text)
            if text.startswith("[")
            else [parse_json(line) for line in text.split("\n") if line.strip()]
        )
        # Half a surrogate pair, which no tokenizer takes, cannot be encoded.
        json.dumps(rows, ensure_ascii=False, allow_nan=False).encode()
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"task {task}: {found[0]} cannot be read as rows of JSON ({first_line(error)})") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"task {task}: {found[0]} has no rows, an object of JSON on each line")
    return rows
