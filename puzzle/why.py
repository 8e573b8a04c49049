"""Why a goal cannot be met, in the user's words: which limits are in conflict, and how far each one alone could go."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from puzzle.goal import Goal
from puzzle.predict import CostModel, Prediction
from puzzle.solver.explain import nearest, smallest_conflict
from puzzle.solver.problem import Problem

Words = tuple[str, bool, Callable[[float], str]]  # (the limit as typed, larger is better, what is reachable)


def why_infeasible(problems: Mapping[str, Problem], costs: CostModel, goal: Goal, parent: Prediction) -> str:
    """One line. problems: by batch size, each without a solution."""
    limits = smallest_conflict(list(problems.values()))
    assert limits is not None, "the problems were found infeasible"
    words = _words(costs, goal, parent)
    reach = {int(b): nearest(problem, limits) for b, problem in problems.items()}
    typed = " and ".join(words[label][0] for label in limits)
    found = [text for label in limits if (text := _reach(label, words, reach, costs)) is not None]
    if not found:
        return (
            f"{typed} cannot be met: no value of one of them alone would do; relax several, or offer cheaper variants"
        )
    if len(limits) == 1:
        return f"{typed} cannot be met: {found[0]}; relax it or offer cheaper variants"
    return f"{typed} cannot be met together: with the rest kept, {', or '.join(found)}; relax one, or offer cheaper variants"


def _reach(
    label: str, words: dict[str, Words], reach: dict[int, dict[str, tuple[str, float]]], costs: CostModel
) -> str | None:
    """The best over the batch sizes when this limit alone gives way. reach: by batch size, what `nearest` found."""
    _, larger, text = words[label]
    values = []
    for batch, limits in reach.items():
        if label in limits:
            value = limits[label][1]
            values.append(batch * costs.work.output_len / value if label == "throughput" else value)
    return text((max if larger else min)(values)) if values else None


def _words(costs: CostModel, goal: Goal, parent: Prediction) -> dict[str, Words]:
    steps = max(1, costs.work.output_len - 1)

    def seconds(limit, own: float) -> str:
        return f"{limit.absolute(own):g} s" if limit else ""

    def size(limit, own: float) -> str:
        return f"{limit.absolute(own):.0f}" if limit else ""

    own = parent.tokens_per_second
    return {
        "throughput": (
            f"--throughput {goal.throughput}",
            True,
            lambda v: f"the fastest child reaches {v / own:.3g}x ({v:.4g} tok/s; the parent {own:.4g})",
        ),
        "latency": (
            f"--latency {seconds(goal.latency, parent.latency_seconds)}",
            False,
            lambda v: f"the fastest child takes {v:.4g} s",
        ),
        "ttft": (
            f"--ttft {seconds(goal.ttft, parent.ttft_seconds)}",
            False,
            lambda v: f"the least time to the first token is {v:.4g} s",
        ),
        "tpot": (
            f"--tpot {seconds(goal.tpot, parent.tpot_seconds)}",
            False,
            lambda v: f"the least time per later token is {v / steps:.4g} s",
        ),
        "memory": (
            f"--memory {size(goal.memory, parent.memory_bytes)} bytes",
            False,
            lambda v: f"the smallest child takes {v:.0f} bytes",
        ),
        "params": (
            f"--params {size(goal.max_parameters, parent.num_parameters)}",
            False,
            lambda v: f"the smallest child has {v:.0f} parameters",
        ),
        "cached-tokens": (
            f"--cached-tokens {goal.cached_tokens}",
            False,
            lambda v: f"that many tokens need {v:.0f} bytes",
        ),
        "keep-attention": (
            f"--keep-attention {goal.keep_attention}",
            True,
            lambda v: f"at most {v:.0f} layers can keep attention",
        ),
        "stages": (
            f"--stages {goal.stages}",
            False,
            lambda v: f"stages can be balanced within {100 * v:.1f} %",
        ),
        "pins": (f"--pin {goal.pinned}", False, lambda v: ""),
        "equal": (f"--alike {goal.alike}", False, lambda v: ""),
    }
