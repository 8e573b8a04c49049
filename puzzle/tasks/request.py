"""What a task asks of a model, and what was answered, kept in a file: a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError, writing
from puzzle.base.files import content_hash, parse_json

Text = str | tuple[int, ...]  # or its tokens
Answer = Any  # [log-likelihood in nats, whether every token is the likeliest] of a continuation, or a text
START = b'{"key": '


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """continuation: whose log-likelihood after `context` is asked for; None: a text of up to max_tokens tokens, up to one of
    `until`, is. temperature 0 is greedy; sample: which of several; thinking: what stands before </think> is no answer, which is empty
    where a thought came to no end; None: it belongs to the answer, which is empty where it came to no end itself."""

    context: Text
    continuation: Text | None = None
    until: tuple[str, ...] = ()
    max_tokens: int = 0
    temperature: float = 0.0
    sample: int = 0
    thinking: bool | None = False

    def key(self, model: str) -> str:
        """Of this request to a model of this hash."""
        return content_hash([model, asdict(self)])


def _is_answer(value: Any) -> bool:
    if isinstance(value, str):
        return True
    kinds = [type(one) for one in value] if isinstance(value, list) else []
    return kinds in ([float, bool], [int, bool]) and math.isfinite(value[0])


class Answers:
    """A line each: {"key", "model": its name, "answer", "tokens", "seconds"}. Raises UserError for a file of something else."""

    def __init__(self, path: Path):
        self.path, self.lines = path, dict[str, dict[str, Any]]()
        if path.exists() and not path.is_file():  # a device would be read for ever
            raise UserError(f"`answers` {path} is no file: name one")
        data = path.read_bytes() if path.exists() else b""
        self.end = data.rfind(b"\n") + 1  # a killed process leaves a part of a line
        for number, line in enumerate(data[: self.end].splitlines(), 1):
            try:
                one = parse_json(line)
                assert one.keys() >= {"key", "model", "answer", "tokens", "seconds"}
                assert isinstance(one["key"], str)
                assert _is_answer(one["answer"])
                assert all(type(one[name]) in (int, float) and one[name] >= 0 for name in ("tokens", "seconds"))
                self.lines[one["key"]] = one
            except (ValueError, AttributeError, AssertionError):
                raise self._foreign(number) from None
        if not self.end and not START.startswith(data[: len(START)]):
            raise self._foreign(1)

    def _foreign(self, number: int) -> UserError:
        return UserError(f"`answers` {self.path} line {number} is no answer of `puzzle evaluate`: name another file")

    def keep(self, lines: Sequence[dict[str, Any]]) -> None:
        """At the end of the file, at once."""
        data = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as handle:
                handle.truncate(self.end)
                handle.write(data)
        self.end += len(data)
        self.lines |= {line["key"]: line for line in lines}
