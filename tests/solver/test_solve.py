"""Back ends against brute force, degenerate data, and the baselines."""

from __future__ import annotations

import math
import random
import tempfile
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puzzle.solver.baselines import greedy, random_feasible, uniform
from puzzle.solver.problem import Constraint, Layer, Problem, ProblemError, Variant, exact, exact_sum
from puzzle.solver.solve import solve
from puzzle.solver.sweep import sweep

BACKENDS = ("ortools", "pulp")
numbers = st.one_of(st.integers(-3, 5).map(float), st.floats(-2, 5, allow_nan=False, width=32))


@st.composite
def problems(draw) -> Problem:
    """Up to 4 layers of up to 4 variants, two resources, limits on either side that often bind exactly."""
    layers = []
    for i in range(draw(st.integers(1, 4))):
        variants = tuple(
            Variant(
                name=f"v{j}", score=draw(numbers), resources={"a": draw(numbers), "b": float(draw(st.integers(0, 4)))}
            )
            for j in range(draw(st.integers(1, 4)))
        )
        layers.append(Layer(name=f"L{i}", variants=variants))
    high = float(draw(st.integers(0, 4 * len(layers))))
    constraints = [Constraint(resource="a", max=draw(st.floats(-2, 12))), Constraint(resource="b", max=high)]
    if draw(st.booleans()):
        constraints.append(Constraint(resource="b", min=float(draw(st.integers(0, 5))), name="at least"))
    fixed = {"a": draw(st.floats(0, 1))} if draw(st.booleans()) else {}
    return Problem(layers=tuple(layers), constraints=tuple(constraints), fixed=fixed)


@given(problems())
@settings(max_examples=250, deadline=None)
def test_ortools_equals_brute_force(problem):
    check(problem, "ortools")


@given(problems())
@settings(max_examples=60, deadline=None)
def test_pulp_equals_brute_force(problem):
    check(problem, "pulp")


def check(problem: Problem, backend: str) -> None:
    truth, found = solve(problem, "brute"), solve(problem, backend)
    assert found.status == truth.status
    if truth.choice:
        assert not problem.violated(found.choice)
        assert math.isclose(found.objective, truth.objective, rel_tol=1e-9, abs_tol=1e-9)
        assert found.gap == 0
        for constraint in problem.constraints:
            assert found.slack[constraint.label] >= 0


def two_layers(scores, costs, limit) -> Problem:
    layers = tuple(
        Layer(
            name=f"L{i}",
            variants=tuple(
                Variant(name=f"v{j}", score=s, resources={"c": c})
                for j, (s, c) in enumerate(zip(scores, costs, strict=True))
            ),
        )
        for i in range(2)
    )
    return Problem(layers=layers, constraints=(Constraint(resource="c", max=limit),))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_scales(backend, scale):
    """The same optimum whatever the units of scores and resources."""
    problem = two_layers([0.0, 3 * scale, 4 * scale], [5 / scale, 2 / scale, 1 / scale], 6 / scale)
    found, truth = solve(problem, backend), solve(problem, "brute")
    assert not problem.violated(found.choice)
    assert found.objective == pytest.approx(truth.objective, rel=1e-9, abs=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equality_with_the_limit_is_allowed(backend):
    problem = two_layers([0.0, 1.0], [0.75, 0.25], 1.0)
    assert solve(problem, backend).objective == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temporary_directory_with_spaces(backend, tmp_path, monkeypatch):
    (tmp_path / "my own").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "my own"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "my own"))
    assert solve(two_layers([0.0, 1.0], [0.75, 0.25], 1.0), backend).objective == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_says_so(backend):
    found = solve(two_layers([0.0, 1.0], [2.0, 1.0], 1.5), backend)
    assert found.status == "infeasible"
    assert found.choice == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_layer_one_variant_equal_scores(backend):
    single = Problem(layers=(Layer(name="L", variants=(Variant(name="v", score=-1.0, resources={}),)),))
    assert solve(single, backend).objective == -1.0
    assert solve(two_layers([1.0, 1.0], [1.0, 1.0], 2.0), backend).objective == 2.0


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (lambda: two_layers([math.nan, 1.0], [1.0, 1.0], 2.0), "L0 variant v0 score is nan"),
        (lambda: two_layers([0.0, 1.0], [1.0, math.inf], 2.0), "L0 variant v1 c is inf"),
        (lambda: two_layers([0.0], [1.0], math.nan), "limit c is nan"),
        (lambda: Problem(layers=()), "no layers"),
        (lambda: Layer(name="L", variants=()), "no variants"),
        (
            lambda: Layer(name="L", variants=two_layers([0.0], [1.0], 1.0).layers[0].variants * 2),
            "variant of layer L 'v0'",
        ),
        (lambda: Layer(name="L", variants=(Variant(name="v", score=True, resources={}),)), "score is True"),
        (
            lambda: Problem(
                layers=two_layers([0.0], [1.0], 1).layers, constraints=(Constraint(resource="x", max=1.0),)
            ),
            "no x",
        ),
        (lambda: solve(two_layers([0.0], [1.0], 2.0), "cplex"), "unknown back end 'cplex'"),
    ],
)
def test_bad_problems_name_the_cell(build, wanted):
    with pytest.raises(ProblemError, match=wanted):
        build()


@given(
    st.lists(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**30), 10**30)), max_size=9)
)
def test_sums_are_exact(values):
    """Of the largest and the smallest numbers together, too."""
    assert exact_sum(values) == sum(map(exact, values))
    largest, smallest = 1.7976931348623157e308, 5e-324
    assert exact_sum([*values, largest, smallest, -largest]) - exact_sum(values) == exact(smallest)


def test_sweep_keeps_the_best():
    tight, loose = two_layers([0.0, 1.0], [2.0, 1.0], 2.0), two_layers([0.0, 1.0], [2.0, 1.0], 3.0)
    hopeless = two_layers([0.0, 1.0], [2.0, 1.0], 1.0)
    best, found = sweep({"1": tight, "2": loose, "3": hopeless})
    assert best == "2"
    assert [found[k].status for k in "123"] == ["cutoff", "optimal", "infeasible"]
    assert sweep({"3": hopeless})[0] is None


@given(problems())
@settings(max_examples=50, deadline=None)
def test_baselines_are_feasible_and_never_better(problem):
    best = solve(problem, "brute")
    for found in (greedy(problem), uniform(problem), *random_feasible(problem, 3)):
        if found.choice:
            assert not problem.violated(found.choice)
            assert found.objective >= best.objective - 1e-9


def test_random_choices_of_many_layers_are_quick():
    """32 layers of 12 variants: the same ones by the same seed, pins kept; and none at once, where no choice meets the limits."""
    draws = random.Random(0)
    layers = tuple(
        Layer(
            name=f"L{i:02d}",
            variants=tuple(
                Variant(name=f"v{j}", score=j * draws.random(), resources={"a": (12 - j) * (1 + draws.random() / 10)})
                for j in range(12)
            ),
        )
        for i in range(32)
    )
    problem = Problem(layers=layers, constraints=(Constraint(resource="a", max=230.4),), pins={"L03": ("v1", "v2")})
    started = time.monotonic()
    found = random_feasible(problem, 20)
    assert [one.choice for one in found] == [one.choice for one in random_feasible(problem, 20)]
    assert [one.choice for one in found] != [one.choice for one in random_feasible(problem, 20, seed=1)]
    assert len(found) == 20
    assert all(not problem.violated(one.choice) for one in found)
    assert random_feasible(replace(problem, constraints=(Constraint(resource="a", max=30.0),)), 20) == []
    assert time.monotonic() - started < 30  # seconds; it was minutes


def test_greedy_follows_the_papers_rule():
    """Equal shares of 3: the first layer takes cost 3 (score 1), not 4; it leaves nothing over for the second."""
    problem = two_layers([0.0, 1.0, 5.0], [4.0, 3.0, 1.0], 6.0)
    assert greedy(problem).choice == {"L0": "v1", "L1": "v1"}
    assert uniform(problem).choice == {"L0": "v1", "L1": "v1"}
