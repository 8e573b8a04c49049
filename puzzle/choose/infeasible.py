"""Why a goal cannot be met, in the user's words: which limits are in conflict, and how far each one alone could go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from puzzle.choose.goal import Target
from puzzle.choose.workloads import Served
from puzzle.solver.explain import nearest, smallest_conflict
from puzzle.solver.problem import Problem


@dataclass(frozen=True, slots=True)
class Words:
    """A limit as it was typed, and what to say of the best reachable value. value: (batch, resource) -> that value."""

    typed: str
    text: Callable[[float], str]
    larger: bool = False
    value: Callable[[int, float], float] = lambda _, resource: resource


def why_infeasible(problems: Mapping[str, Problem], served: Sequence[Served]) -> str:
    """One line. problems: by batch size, each without a solution. served: the workloads, the main one first."""
    limits = smallest_conflict(list(problems.values()))
    assert limits is not None, "the problems were found infeasible"
    words: dict[str, Words] = {}
    for one in served:
        words |= _words(one)
    words |= _structure(served[0])
    reach = {int(b): nearest(problem, limits) for b, problem in problems.items()}
    typed = " and ".join(words[label].typed for label in limits)
    found = [text for label in limits if (text := _reach(label, words[label], reach)) is not None]
    if not found:
        return (
            f"{typed} cannot be met: no value of one of them alone would do; relax several, or offer cheaper variants"
        )
    if len(limits) == 1:
        return f"{typed} cannot be met: {found[0]}; relax it or offer cheaper variants"
    return f"{typed} cannot be met together: with the rest kept, {', or '.join(found)}; relax one, or offer cheaper variants"


def _reach(label: str, words: Words, reach: dict[int, dict[str, tuple[str, float]]]) -> str | None:
    """The best over the batch sizes when this limit alone gives way. reach: by batch size, what `nearest` found."""
    values = [words.value(batch, limits[label][1]) for batch, limits in reach.items() if label in limits]
    return words.text((max if words.larger else min)(values)) if values else None


def _words(one: Served) -> dict[str, Words]:
    """The limits of one workload."""
    goal, parent, output_len, end = one.goal, one.parent, one.costs.work.output_len, one.suffix
    own, steps = parent.tokens_per_second, max(1, output_len - 1)

    def seconds(limit: Target | None, own: float) -> str:
        return f"{limit.absolute(own):g} s" if limit else ""

    def throughput(batch: int, total: float) -> float:
        return one.at(batch) * output_len / total

    found = {
        "throughput": Words(
            f"throughput {goal.throughput}",
            lambda v: f"the fastest child reaches {v / own:.3g}x ({v:.4g} tok/s; the parent {own:.4g})",
            larger=True,
            value=throughput,
        ),
        "latency": Words(
            f"latency {seconds(goal.latency, parent.latency_seconds)}", lambda v: f"the fastest child takes {v:.4g} s"
        ),
        "ttft": Words(
            f"ttft {seconds(goal.ttft, parent.ttft_seconds)}",
            lambda v: f"the least time to the first token is {v:.4g} s",
        ),
        "tpot": Words(
            f"tpot {seconds(goal.tpot, parent.tpot_seconds)}",
            lambda v: f"the least time per later token is {v / steps:.4g} s",
        ),
        "memory": Words(
            f"memory {goal.memory.absolute(parent.memory_bytes) if goal.memory else 0:.0f} bytes",
            lambda v: f"the smallest child takes {v:.0f} bytes",
        ),
    }
    head = f"--also {end[1:]}:" if end else "--"
    return {label + end: replace(words, typed=head + words.typed) for label, words in found.items()}


def _structure(main: Served) -> dict[str, Words]:
    """The limits that no workload changes."""
    goal, parent = main.goal, main.parent
    most = goal.max_parameters.absolute(parent.num_parameters) if goal.max_parameters else 0
    return {
        "params": Words(f"--params {most:.0f}", lambda v: f"the smallest child has {v:.0f} parameters"),
        "cached-tokens": Words(
            f"--cached-tokens {goal.cached_tokens}", lambda v: f"that many tokens need {v:.0f} bytes"
        ),
        "keep-attention": Words(
            f"--keep-attention {goal.keep_attention}",
            lambda v: f"at most {v:.0f} layers can keep attention",
            larger=True,
        ),
        "stages": Words(f"--stages {goal.stages}", lambda v: f"stages can be balanced within {100 * v:.1f} %"),
        "pins": Words(f"--pin {goal.pinned}", lambda v: ""),
        "equal": Words(f"--alike {goal.alike}", lambda v: ""),
    }
