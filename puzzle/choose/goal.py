"""What the user asks of a child, parsed and checked. Needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields

from puzzle.base.errors import UserError
from puzzle.base.units import parse_bytes, parse_count, parse_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A number, absolute or as a multiple of the parent's."""

    value: float
    relative: bool

    def absolute(self, parent: float) -> float:
        return self.value * parent if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}{'x' if self.relative else ''}"


def parse_target(option: str, text: str, absolute: Callable[[str], float], example: str) -> Target:
    """'2x' and '60%' are relative to the parent, anything else goes to `absolute`. Raises UserError unless above 0."""
    found = re.fullmatch(r"\s*([-+0-9.eE]+|nan|inf)\s*(x|%)\s*", text)
    if not found:
        return Target(value=absolute(text), relative=False)
    try:
        value = float(found[1]) / (100 if found[2] == "%" else 1)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{option} {text}: write {example}; it must be above 0")
    return Target(value=value, relative=True)


def parse_throughput(text: str) -> Target:
    """'2x' (of the parent's best), '500' or '500tok/s'. Raises UserError unless it is a positive number."""
    example = "a multiple of the parent such as 2x, or tokens per second such as 500"

    def absolute(text: str) -> float:
        found = re.fullmatch(r"\s*([-+0-9.eE]+)\s*(tok/s|tokens/s)?\s*", text)
        try:
            value = float(found[1]) if found else math.nan
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"--throughput {text}: write {example}; it must be above 0")
        return value

    return parse_target("--throughput", text, absolute, example)


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """Limits on the child. throughput in tokens/s of a whole batch; latency, ttft, tpot in seconds (prompt to last token,
    to first token, per later token); memory in bytes of weights, KV cache and measured workspace; max_parameters a count.
    cached_tokens: tokens whose cache fits `memory` beside the rest. keep_attention: layers that keep softmax attention. pinned: layers
    ("0-1,15") that keep the parent's block. alike: layers that choose the same. stages: contiguous, of equal time within
    stage_tolerance. Raises UserError when the fields contradict each other."""

    throughput: Target | None = None
    latency: Target | None = None
    ttft: Target | None = None
    tpot: Target | None = None
    memory: Target | None = None
    max_parameters: Target | None = None
    cached_tokens: int | None = None
    keep_attention: int | None = None
    pinned: str | None = None
    alike: str | None = None
    stages: int | None = None
    stage_tolerance: float = 0.05

    def check(self) -> None:
        limits = [f.name for f in fields(self) if f.name not in ("pinned", "alike", "stages", "stage_tolerance")]
        if all(getattr(self, name) is None for name in limits):
            raise UserError("no goal: pass at least one of --throughput, --latency, --memory, --params")
        if self.cached_tokens is not None and self.memory is None:
            raise UserError("--cached-tokens needs --memory: say what the weights and the cache must fit in, e.g. 80GB")
        if not 0 <= self.stage_tolerance < math.inf:
            raise UserError(f"--stage-tolerance {self.stage_tolerance:g}: must be 0 or more, such as 5%")


def goal_of(
    throughput: str | None = None,
    latency: str | None = None,
    memory: str | None = None,
    params: str | None = None,
    *,
    ttft: str | None = None,
    tpot: str | None = None,
    cached_tokens: str | None = None,
    keep_attention: int | None = None,
    pinned: str | None = None,
    alike: str | None = None,
    stages: int | None = None,
    stage_tolerance: str | None = None,
) -> Goal:
    """A Goal from what the user typed. Raises UserError."""

    def seconds(option: str, text: str | None) -> Target | None:
        if text is None:
            return None
        return parse_target(option, text, lambda t: parse_seconds(option, t), "seconds such as 1.5, 800ms or 50%")

    goal = Goal(
        throughput=parse_throughput(throughput) if throughput is not None else None,
        latency=seconds("--latency", latency),
        ttft=seconds("--ttft", ttft),
        tpot=seconds("--tpot", tpot),
        memory=parse_target("--memory", memory, parse_bytes, "bytes such as 80GB or 60%")
        if memory is not None
        else None,
        max_parameters=parse_target(
            "--params", params, lambda t: parse_count("--params", t), "a count such as 6.5B or 60%"
        )
        if params is not None
        else None,
        cached_tokens=parse_count("--cached-tokens", cached_tokens) if cached_tokens is not None else None,
        keep_attention=keep_attention,
        pinned=pinned,
        alike=alike,
        stages=stages,
        stage_tolerance=parse_tolerance(stage_tolerance) if stage_tolerance is not None else 0.05,
    )
    goal.check()
    return goal


def parse_tolerance(text: str) -> float:
    """'5%' or '0.05'. Raises UserError unless a number from 0 up."""
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%)?\s*", text)
    try:
        value = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"--stage-tolerance {text}: write a share such as 5% or 0.05")
    return value
