"""Problems numbered by an integer: branch and bound finds what trying all of them finds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.solver.interval import best_between, relaxed_between
from puzzle.solver.problem import Constraint, Layer, Problem, Variant
from puzzle.solver.solve import brute_force

NUMBERS = st.floats(0, 8).map(lambda x: round(x, 2))
CELLS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=3)


def family(layers, speed: float, room: float):
    """Time a + c n must be within n / speed, and memory m + k n within room: one eases with n, the other gets harder."""

    def problem(n: int) -> Problem:
        return Problem(
            layers=tuple(
                Layer(
                    name=f"L{i}",
                    variants=tuple(
                        Variant(name=str(v), score=score, resources={"t": a + c * n, "m": a / 2 + k * n})
                        for v, (score, a, c, k) in enumerate(cells)
                    ),
                )
                for i, cells in enumerate(layers)
            ),
            constraints=(Constraint(resource="t", max=n / speed), Constraint(resource="m", max=room)),
        )

    def relaxed(low: int, high: int) -> Problem:
        return relaxed_between(problem(low), problem(high), {})

    return problem, relaxed


@given(st.lists(CELLS, min_size=1, max_size=3), st.floats(0.02, 0.5), st.floats(5, 200), st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_as_good_as_trying_all(layers, speed, room, last):
    problem, relaxed = family(layers, speed, room)
    every = {n: brute_force(problem(n)) for n in range(1, last + 1)}
    least = min((s.objective for s in every.values() if s.choice), default=None)
    best, found = best_between([1, last], problem, relaxed)
    assert (best is None) == (least is None)
    if least is not None:  # a cutoff asks for something better
        assert best_between([1, last], problem, relaxed, cutoff=least)[0] is None
        again, solved = best_between([1, last], problem, relaxed, cutoff=least + 1.0)
        assert again is not None
        assert solved[again].objective == pytest.approx(least, abs=1e-9)
    if best is not None:
        assert found[best].objective == pytest.approx(least, abs=1e-9)
        assert not problem(best).violated(found[best].choice)


def test_few_are_solved():
    problem, relaxed = family([[(0.0, 4, 0.1, 1.0), (1.0, 2, 0.1, 0.5)]] * 4, 0.3, 60.0)
    best, found = best_between([1, 2, 4, 8, 16, 32, 64], problem, relaxed)
    assert best is not None
    assert len(found) < 20
    assert all(s.objective >= found[best].objective or math.isinf(s.objective) for s in found.values())
