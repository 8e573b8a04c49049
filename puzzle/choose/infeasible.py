"""Why a goal cannot be met, in the user's words: which limits are in conflict, and how far each one alone could go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from puzzle.base.units import bytes_text
from puzzle.choose.goal import BY_OPTION, Limit, host_label
from puzzle.choose.workloads import Demand
from puzzle.solver.explain import least, nearest, smallest_conflict, without
from puzzle.solver.problem import Problem


@dataclass(frozen=True, slots=True)
class Words:
    """A limit as it was typed, and what to say of the best reachable value. value: (batch, resource) -> that value."""

    typed: str
    text: Callable[[float], str]
    larger: bool = False
    value: Callable[[int, float], float] = lambda _, resource: resource


def why_infeasible(problems: Mapping[str, Problem], demands: Sequence[Demand]) -> str:
    """One line. problems: by batch size, each without a solution. demands: the workloads, the main one first."""
    limits = smallest_conflict(list(problems.values()))
    assert limits is not None, "the problems were found infeasible"
    words: dict[str, Words] = {}
    for one in demands:
        for option in one.goal.limits:
            words[option + one.suffix] = own = _words(BY_OPTION[option], one)
            words[host_label(option + one.suffix)] = replace(own, text=_at_host_pace(own.text))
    words |= _structure(demands[0])
    reach = {int(b): nearest(problem, limits) for b, problem in problems.items()}
    asked = list(dict.fromkeys(words[label].typed for label in limits))
    typed = " and ".join(asked)
    found = [text for label in limits if (text := _reach(label, words[label], reach)) is not None]
    if not found and (both := _of_both(limits, next(iter(problems.values())))) is not None:
        found = _together(problems, both, words[both[1]])
    if not found:
        return (
            f"{typed} cannot be met: no value of one of them alone would do; relax several, or offer cheaper variants"
        )
    if len(found) == len(asked) == 1:
        return f"{typed} cannot be met: {found[0]}; relax it or offer cheaper variants"
    return f"{typed} cannot be met together: with the rest kept, {', or '.join(found)}; relax one, or offer cheaper variants"


def _reach(label: str, words: Words, reach: dict[int, dict[str, tuple[str, float]]]) -> str | None:
    """The best over the batch sizes when this limit alone gives way. reach: by batch size, what `nearest` found."""
    values = [words.value(batch, limits[label][1]) for batch, limits in reach.items() if label in limits]
    return words.text((max if words.larger else min)(values)) if values else None


def _of_both(limits: Sequence[str], problem: Problem) -> tuple[str, str] | None:
    """Where they are one limit, on the device's time and on the host's: its label, and its label for the host."""
    pairs = [(c.label, host_label(c.label)) for c in problem.constraints]
    known = {c.label for c in problem.constraints}
    return next((pair for pair in pairs if set(limits) <= set(pair) <= known), None)


def _together(problems: Mapping[str, Problem], both: tuple[str, str], words: Words) -> list[str]:
    """The best over the batch sizes of what each of the two allows by itself: nothing goes beyond it. [] where other limits allow nothing."""
    found = []
    for batch, problem in problems.items():
        limits, rest = [c for c in problem.constraints if c.label in both], without(problem, set(both))
        amounts = [least(rest, c, "max" if c.max is not None else "min") for c in limits]
        reached = [words.value(int(batch), amount) for amount in amounts if amount is not None]
        if len(reached) == len(limits):
            found.append((min if words.larger else max)(reached))
    return [f"at best, {words.text((max if words.larger else min)(found))}"] if found else []


def _words(limit: Limit, one: Demand) -> Words:
    """Of a row of `LIMITS`, in one workload."""
    target, own, work = one.goal.limits[limit.option], limit.own(one.parent), one.costs.work
    head = f"`also` {one.suffix[1:]}:{limit.option}" if one.suffix else f"`{limit.option}`"
    asked = target.absolute(own)
    typed = f"{head} {limit.unit.format(target=target, absolute=asked, bytes=bytes_text(asked))}"
    return Words(
        typed,
        lambda value: limit.words.format(value=value, times=value / own, own=own, bytes=bytes_text(value)),
        limit.larger,
        lambda batch, amount: limit.reached(amount, one.at(batch), work),
    )


def _at_host_pace(text: Callable[[float], str]) -> Callable[[float], str]:
    return lambda value: f"{text(value)}, since the engine's own Python sets the pace"


def _structure(main: Demand) -> dict[str, Words]:
    """What is asked of the architecture itself."""
    goal = main.goal
    return {
        "cached_tokens": Words(
            f"`cached_tokens` {goal.cached_tokens}", lambda v: f"that many tokens need {v:.0f} bytes ({bytes_text(v)})"
        ),
        "keep_attention": Words(
            f"`keep_attention` {goal.keep_attention}",
            lambda v: f"at most {v:.0f} layers can keep attention",
            larger=True,
        ),
        "stages": Words(f"`stages` {goal.stages}", lambda v: f"stages can be balanced within {100 * v:.1f} %"),
        "pins": Words(f"`pinned` {goal.pinned}", lambda v: ""),
        "equal": Words(f"`alike` {goal.alike}", lambda v: ""),
    }
