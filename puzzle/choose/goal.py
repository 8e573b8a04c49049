"""What the user asks of a child, parsed and checked. Needs no torch.

A limit on a resource is one row of `LIMITS`: its option, how its text is read, the solver's resource that it bounds, and the words
for what can be reached. Command line, recipe, problem, architecture.json and messages all read this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

from puzzle.base.errors import UserError
from puzzle.base.units import number_in, parse_bytes, parse_count, parse_seconds
from puzzle.base.workload import Workload
from puzzle.measure.architecture import Prediction


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A number, absolute or as a multiple of the parent's."""

    value: float
    relative: bool

    def absolute(self, parent: float) -> float:
        return self.value * parent if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.value:g}{'x' if self.relative else ''}"

    def plain(self) -> str | float:
        """For JSON: a relative target as text ("2x"), an absolute one as its number."""
        return str(self) if self.relative else self.value


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """option: its name, everywhere. read: an absolute amount's text; example, help, metavar: how it is written. own: the parent's
    figure, which relative targets multiply. resource: of the selection problem; bound: (target, batch, workload) -> the most that
    the resource may be, and reached: the figure that an amount of the resource means. words: what to say of the best figure that
    can be reached, with {value} and, where it says more, {times}, a multiple, or {bytes}, of a size; unit: of what was asked for,
    {absolute}; larger: whether more is better. of_workload: whether each workload has its own."""

    option: str
    read: Callable[[str, str], float]
    example: str
    help: str
    resource: str
    own: Callable[[Prediction], float]
    words: str
    unit: str
    bound: Callable[[float, int, Workload], float] = lambda value, batch, work: value
    reached: Callable[[float, int, Workload], float] = lambda amount, batch, work: amount
    larger: bool = False
    of_workload: bool = True

    @property
    def paced(self) -> bool:
        """Whether an engine's own Python may be what takes that long."""
        return self.resource in ("seconds", "decode_seconds")


def _steps(work: Workload) -> int:
    """Decode steps of a request."""
    return max(1, work.output_len - 1)


def check_steps(goal: Goal, work: Workload) -> None:
    """Raise UserError for a limit on decode steps of requests that have none."""
    if "tpot" in goal.limits and work.output_len < 2:
        raise UserError("`tpot` is the time per later token, and `output_len` 1 has none: limit `ttft` or `latency`")


def read_rate(option: str, text: str) -> float:
    """'500' or '500tok/s'. Raises UserError unless positive."""
    value = number_in(text, {"": 1, "tok/s": 1, "tokens/s": 1})
    if value is None or not 0 < value < math.inf:
        raise UserError(f"`{option}` {text}: write {_RATE}; it must be above 0")
    return value


_RATE = "a multiple of the parent such as 2x, or tokens per second such as 500"
_SECONDS = "seconds such as 1.5, 800ms or 50%"
LIMITS = (
    Limit(
        option="throughput",
        read=read_rate,
        example=_RATE,
        help="2x (of the parent at its best batch) or tokens/s.",
        resource="seconds",
        own=lambda p: p.tokens_per_second,
        bound=lambda value, batch, work: batch * work.output_len / value,
        reached=lambda amount, batch, work: batch * work.output_len / amount,
        words="the fastest child reaches {times:.3g}x ({value:.4g} tok/s; the parent {own:.4g})",
        unit="{target}",
        larger=True,
    ),
    Limit(
        option="latency",
        read=parse_seconds,
        example=_SECONDS,
        help="Prompt to last token of a batch: 1.5, 800ms or 50%.",
        resource="seconds",
        own=lambda p: p.latency_seconds,
        words="the fastest child takes {value:.4g} s",
        unit="{absolute:g} s",
    ),
    Limit(
        option="ttft",
        read=parse_seconds,
        example=_SECONDS,
        help="Time to the first token: 0.2, 200ms or 50%.",
        resource="prefill_seconds",
        own=lambda p: p.ttft_seconds,
        words="the least time to the first token is {value:.4g} s",
        unit="{absolute:g} s",
    ),
    Limit(
        option="tpot",
        read=parse_seconds,
        example=_SECONDS,
        help="Time per later token: 20ms or 50%.",
        resource="decode_seconds",
        own=lambda p: p.tpot_seconds,
        bound=lambda value, batch, work: value * _steps(work),
        reached=lambda amount, batch, work: amount / _steps(work),
        words="the least time per later token is {value:.4g} s",
        unit="{absolute:g} s",
    ),
    Limit(
        option="memory",
        read=lambda option, text: float(parse_bytes(text, option)),
        example="bytes such as 80GB or 60%",
        help="Weights, KV cache at full context, workspace: 80GB or 60%.",
        resource="memory_bytes",
        own=lambda p: p.memory_bytes,
        words="the smallest child takes {value:.0f} bytes ({bytes})",
        unit="{absolute:.0f} bytes ({bytes})",
    ),
    Limit(
        option="params",
        read=lambda option, text: float(parse_count(option, text)),
        example="a count such as 6.5B or 60%",
        help="Parameters: 6.5B or 60%.",
        resource="num_parameters",
        own=lambda p: p.num_parameters,
        words="the smallest child has {value:.0f} parameters",
        unit="{absolute:.0f}",
        of_workload=False,
    ),
    Limit(
        option="active_params",
        read=lambda option, text: float(parse_count(option, text)),
        example="a count such as 3B or 60%",
        help="Parameters that a token uses, of mixtures of experts its own: 3B or 60%.",
        resource="active_parameters",
        own=lambda p: p.active_parameters or p.num_parameters,
        words="the child with the fewest has {value:.0f} active parameters",
        unit="{absolute:.0f}",
        of_workload=False,
    ),
)


def host_label(label: str) -> str:
    """What the same limit is called where an engine's own Python may set the pace."""
    return f"{label} (host)"


BY_OPTION = {limit.option: limit for limit in LIMITS}
# Of a frontier, which sets this limit itself.
AXES = {"throughput": "tokens/s", "latency": "seconds", "memory": "bytes"}


def parse_target(limit: Limit, text: str) -> Target:
    """'2x' and '60%' are relative to the parent, anything else an absolute amount. Raises UserError unless above 0."""
    value = number_in(text, {"x": 1, "%": 100})
    if value is None:
        return Target(value=limit.read(limit.option, text), relative=False)
    if not 0 < value < math.inf:
        raise UserError(f"`{limit.option}` {text}: write {limit.example}; it must be above 0")
    return Target(value=value, relative=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """limits: by option. cached_tokens: tokens whose cache fits the memory limit beside the rest. keep_attention: layers that keep
    softmax attention. pinned: layers ("0-1,15") that keep the parent's sub-blocks. alike: layers that choose the same. stages:
    contiguous, of equal time within stage_tolerance. concurrency: requests at once at which all limits hold; None: free for a
    goal of throughput, the parent's best batch for any other."""

    limits: Mapping[str, Target] = field(default_factory=dict)
    cached_tokens: int | None = None
    keep_attention: int | None = None
    pinned: str | None = None
    alike: str | None = None
    stages: int | None = None
    stage_tolerance: float = 0.05
    concurrency: int | None = None

    def check(self) -> None:
        """Raise UserError when the fields contradict each other, or ask for nothing."""
        if not self.limits and self.cached_tokens is None and self.keep_attention is None:
            raise UserError(f"no goal: pass at least one of {', '.join(f'`{option}`' for option in BY_OPTION)}")
        if self.cached_tokens is not None and "memory" not in self.limits:
            raise UserError("`cached_tokens` needs `memory`: say what the weights and the cache must fit in, e.g. 80GB")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError(f"`concurrency` {self.concurrency}: at least 1 request is served")
        if self.keep_attention is not None and self.keep_attention < 0:
            raise UserError(f"`keep_attention` {self.keep_attention}: must not be negative")
        if not 0 <= self.stage_tolerance <= 1:
            raise UserError(f"`stage_tolerance` {self.stage_tolerance:g}: a share from 0 to 1, such as 5% or 0.05")

    def plain(self) -> dict[str, str | float | int | None]:
        """All of it for JSON, by option; None where nothing was asked."""
        asked = {option: self.limits[option].plain() if option in self.limits else None for option in BY_OPTION}
        rest = ("cached_tokens", "keep_attention", "pinned", "alike", "stages", "concurrency")
        return asked | {name: getattr(self, name) for name in rest}


Options = TypeVar("Options")


@dataclass_transform(kw_only_default=True)
def _with_limits(cls: type[Options]) -> type[Options]:
    """Class decorator: a dataclass with a field of text for every row of `LIMITS` before its own."""
    cls.__annotations__ = {limit.option: "str | None" for limit in LIMITS} | cls.__annotations__
    for limit in LIMITS:
        setattr(cls, limit.option, None)
    return dataclass(kw_only=True, slots=True)(cls)


@_with_limits
class GoalOptions:
    """A goal as it is typed, on the command line or in a recipe."""

    cached_tokens: str | None = None
    keep_attention: int | None = None
    pinned: str | None = None
    alike: str | None = None
    stages: int | None = None
    stage_tolerance: str = "5%"
    concurrency: int | None = None

    def goal(self, *, may_be_empty: bool = False) -> Goal:
        """Raises UserError for what cannot be read, or a goal that is none."""
        goal = self.read()
        asks = (goal.limits, goal.cached_tokens, goal.keep_attention, goal.pinned, goal.alike, goal.stages)
        if not may_be_empty or any(asks):
            goal.check()
        return goal

    def read(self) -> Goal:
        """The same, whether it asks for anything or not."""
        typed = {option: getattr(self, option) for option in BY_OPTION}
        count = self.cached_tokens
        return Goal(
            limits={o: parse_target(BY_OPTION[o], text) for o, text in typed.items() if text is not None},
            cached_tokens=None if count is None else parse_count("cached_tokens", count),
            keep_attention=self.keep_attention,
            pinned=self.pinned,
            alike=self.alike,
            stages=self.stages,
            stage_tolerance=parse_share("stage_tolerance", self.stage_tolerance),
            concurrency=self.concurrency,
        )


def parse_share(option: str, text: str) -> float:
    """'5%' or '0.05'. Raises UserError unless a number from 0 up."""
    value = number_in(text, {"": 1, "%": 100})
    if value is None or not 0 <= value < math.inf:
        raise UserError(f"`{option}` {text}: write a share such as 5% or 0.05")
    return value
