"""The tiny instances in the docstrings of solver/ have the answers that stand there."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest

from puzzle.solver import problem
from puzzle.solver.problem import Problem
from puzzle.solver.solution import Solution
from puzzle.solver.solve import solve


@pytest.mark.parametrize("name", ["problem", "labels", "relax"])
def test_docstring(name):
    done = doctest.testmod(importlib.import_module(f"puzzle.solver.{name}"))
    assert done.attempted > 0
    assert done.failed == 0


def test_every_back_end_gives_the_formulations_answers():
    asked: list[Problem] = []

    def ask(one: Problem) -> Solution:
        asked.append(one)
        return solve(one)

    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(problem.__doc__):
        exec(example.source, names)
        names["solve"] = ask  # in place of what the example imports
    assert len(asked) == 6
    for one in asked:
        answers = [solve(one, backend) for backend in ("ortools", "pulp", "brute")]
        assert len({(a.objective, *a.choice.items()) for a in answers}) == 1
