"""What the user asks of a child, parsed and checked. Needs no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from puzzle.errors import UserError
from puzzle.hardware import parse_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A number, absolute or as a multiple of the parent's."""

    value: float
    relative: bool

    def absolute(self, parent: float) -> float:
        return self.value * parent if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}{'x' if self.relative else ''}"


def parse_throughput(text: str) -> Target:
    """'2x' (of the parent's best), '500' or '500tok/s'. Raises UserError unless it is a positive number."""
    found = re.fullmatch(r"\s*([-+0-9.eE]+)\s*(x|tok/s|tokens/s)?\s*", text)
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"--throughput {text}: write a multiple of the parent such as 2x, or tokens per second such as "
            "500; it must be above 0"
        )
    return Target(value=value, relative=bool(found and found[2] == "x"))


def parse_seconds(option: str, text: str) -> float:
    """'1.5', '1.5s', '800ms' -> seconds. Raises UserError unless positive."""
    found = re.fullmatch(r"\s*([-+0-9.eE]+)\s*(ms|s)?\s*", text)
    try:
        value = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{option} {text}: write seconds such as 1.5 or 800ms; it must be above 0")
    return value


def parse_count(option: str, text: str, least: int = 1) -> int:
    """'7e9', '7B', '12M' -> a count. Raises UserError below `least`."""
    found = re.fullmatch(r"\s*([-+0-9.eE]+?)\s*([kKmMbBtT])?\s*", text)
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    try:
        value = float(found[1]) * (scale[found[2].lower()] if found[2] else 1) if found else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"{option} {text}: write a count such as 6.5B, 12M or 1000000")
    return int(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """Limits on the child. throughput in tokens/s of a whole batch; latency in seconds from prompt to last token of a
    batch; memory in bytes of weights and KV cache; max_parameters a count."""

    throughput: Target | None = None
    latency: float | None = None
    memory: int | None = None
    max_parameters: int | None = None

    def check(self) -> None:
        if self.throughput is None and self.latency is None and self.memory is None and self.max_parameters is None:
            raise UserError("no goal: pass at least one of --throughput, --latency, --memory, --params")


def goal_of(throughput: str | None, latency: str | None, memory: str | None, params: str | None) -> Goal:
    """A Goal from what the user typed. Raises UserError."""
    goal = Goal(
        throughput=parse_throughput(throughput) if throughput is not None else None,
        latency=parse_seconds("--latency", latency) if latency is not None else None,
        memory=parse_bytes(memory) if memory is not None else None,
        max_parameters=parse_count("--params", params) if params is not None else None,
    )
    goal.check()
    return goal
