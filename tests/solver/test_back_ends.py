"""Every back end against brute force, on random small problems with every kind of limit and with pairs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puzzle.solver.explain import explain_infeasible, prices, without
from puzzle.solver.problem import Constraint, Count, Layer, Pair, Problem, ProblemError, Stages, Variant
from puzzle.solver.relax import best_prices
from puzzle.solver.running import Running
from puzzle.solver.solution import Solution
from puzzle.solver.solve import _bounds, _by_programs, _Clock, _possible, solve

whole = st.integers(-3, 5).map(float)
numbers = st.one_of(whole, st.floats(-2, 5, allow_nan=False, width=32), st.sampled_from([0.1, 0.2, 0.3, 0.7]))
quick = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw) -> Problem:
    """Up to 4 layers of up to 4 variants; limits that often bind exactly; pairs near and far, good and bad."""
    layers = []
    for i in range(draw(st.integers(1, 4))):
        variants = tuple(
            Variant(
                name=f"v{j}", score=draw(numbers), resources={"a": draw(numbers), "b": float(draw(st.integers(0, 4)))}
            )
            for j in range(draw(st.integers(1, 4)))
        )
        layers.append(Layer(name=f"L{i}", variants=variants))
    cells = [(la.name, v.name) for la in layers for v in la.variants]
    constraints = [
        Constraint(resource="a", max=draw(st.floats(-2, 12))),
        Constraint(resource="b", max=float(draw(st.integers(0, 4 * len(layers))))),
    ]
    if draw(st.booleans()):
        constraints.append(Constraint(resource="b", min=float(draw(st.integers(0, 5))), name="at least"))
    counts = []
    if draw(st.booleans()):
        some = frozenset(draw(st.lists(st.sampled_from(cells), max_size=6)))
        low, high = draw(st.integers(0, 2)), draw(st.integers(0, 4))
        counts.append(Count(name="some", cells=some, min=low, max=high if high >= low else None))
    pairs = []
    for _ in range(draw(st.integers(0, 4))):
        a, b = draw(st.sampled_from(cells)), draw(st.sampled_from(cells))
        if a[0] != b[0]:
            pairs.append(
                Pair(a=a, b=b, score=draw(numbers), resources={"a": draw(whole)} if draw(st.booleans()) else {})
            )
    pins = {}
    if draw(st.integers(0, 3)) == 0:
        layer = draw(st.sampled_from(layers))
        pins[layer.name] = tuple(draw(st.sets(st.sampled_from([v.name for v in layer.variants]), min_size=1)))
    equal = ()
    if len(layers) > 1 and draw(st.integers(0, 3)) == 0:
        equal = (tuple(draw(st.sets(st.sampled_from([la.name for la in layers]), min_size=2))),)
    stages = None
    if draw(st.integers(0, 3)) == 0:
        stages = Stages(
            resource="b", count=draw(st.integers(1, len(layers))), tolerance=draw(st.sampled_from([0.0, 0.25, 1.0]))
        )
    return Problem(
        layers=tuple(layers),
        constraints=tuple(constraints),
        counts=tuple(counts),
        pairs=tuple(pairs),
        fixed={"a": draw(st.floats(0, 1))} if draw(st.booleans()) else {},
        pins=pins,
        equal=equal,
        stages=stages,
    )


def layers_of(rows) -> tuple[Layer, ...]:
    """A row for each layer, of (score, a, b) of each of its variants."""
    return tuple(
        Layer(
            name=f"L{i}",
            variants=tuple(
                Variant(name=f"v{n}", score=s, resources={"a": a, "b": b}) for n, (s, a, b) in enumerate(row)
            ),
        )
        for i, row in enumerate(rows)
    )


def by_highs(problem: Problem) -> Solution:
    """HiGHS on widening sets of cells: what the default back end leaves to it when there are too many labels."""
    arrays = _possible(problem)
    if arrays is None:
        return solve(problem)
    bounds, through = _bounds(arrays, best_prices(arrays), arrays.allowed)
    lower = max(b.value for b in bounds)
    return _by_programs(problem, arrays, through, _Clock(None), lower, 0.01, lower, lower, None, math.inf)


by_cbc = partial(solve, backend="pulp")


def check(problem: Problem, *runs) -> None:
    truth = solve(problem, "brute")
    for run in runs:
        found = run(problem)
        assert found.status == truth.status, run
        if truth.choice:
            assert problem.violated(found.choice) == [], run
            assert math.isclose(found.objective, truth.objective, rel_tol=1e-9, abs_tol=1e-9), run
            assert found.gap == 0, run
            assert found.bound == found.objective, run
            assert all(slack >= 0 for slack in found.slack.values()), run


@given(problems())
@quick
def test_all_equal_brute_force(problem):
    """On the same problems: to make one takes longer than to solve it."""
    check(problem, solve, by_cbc, by_highs)


def test_cbc_does_not_call_another_choice_optimal():
    """Its preprocessing did: 0.0 where -1.0 is there."""
    rows = (  # score, a, b
        ((0.0, 0.0, 0.0), (-2.0, 3.0, 0.0), (0.0, 0.0, 1.0)),
        ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
        ((0.0, 0.0, 0.0), (0.0, 4.0, 0.0), (0.0, 0.1, 0.0)),
    )
    limits = (Constraint(resource="a", max=3.5), Constraint(resource="b", max=0.0))
    check(Problem(layers=layers_of(rows), constraints=limits), by_cbc)


def test_stages_that_are_just_balanced():
    """Loads of 1, 1, 1 and 3 over two stages, none of which may differ from the mean: a third is no number that a program holds."""
    rows = (  # score, a, b
        ((0.0, 0.0, 1.0), (0.0, 0.0, 3.0), (2.0, 0.0, 0.0)),
        ((0.0, 0.0, 1.0),),
        ((0.0, 0.0, 1.0),),
        ((0.0, 1.0, 0.0), (0.0, 0.0, 3.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 2.0)),
    )
    limits = (Constraint(resource="a", max=0.0), Constraint(resource="b", max=12.0))
    stages = Stages(resource="b", count=2, tolerance=0.0)
    problem = Problem(layers=layers_of(rows), constraints=limits, stages=stages)
    check(problem, solve, by_cbc)


@pytest.mark.parametrize("score", [0.0, 0.1, -1.0])
@pytest.mark.parametrize("hair", [0.0, 1e-9, 5.960464477539063e-08, 1e-6])
def test_a_limit_that_is_missed_by_a_hair(hair, score):
    """Left alone, CBC calls some of these infeasible: choices at 0 miss the limit of -hair, those at -2 and -1 meet it."""
    cells = (
        (("v0", 1.0, -2.0), ("v1", score, 0.0), ("v2", 0.0, 0.0), ("v3", 0.0, 0.0)),
        (("v0", 0.0, 0.0), ("v1", score, 0.0), ("v2", 0.0, 1.0), ("v3", 0.0, -1.0)),
    )
    layers = tuple(
        Layer(name=f"L{i}", variants=tuple(Variant(name=name, score=s, resources={"a": a}) for name, s, a in row))
        for i, row in enumerate(cells)
    )
    problem = Problem(layers=layers, constraints=(Constraint(resource="a", max=0.0),), fixed={"a": hair})
    check(problem, solve, by_cbc)


def test_a_crash_of_cbc_is_said_and_leaves_no_files(tmp_path, monkeypatch):
    """After both ways to ask it."""
    import pulp

    (tmp_path / "tmp").mkdir()
    crashing = tmp_path / "cbc"
    crashing.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\nkill -9 $$\n')
    crashing.chmod(0o755)
    monkeypatch.setattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", str(crashing))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    problem = Problem(layers=layers_of((((0.0, 1.0, 0.0), (1.0, 0.0, 0.0)),)), constraints=())
    with pytest.raises(ProblemError, match="CBC crashes on this problem: use the back end 'ortools'"):
        solve(problem, "pulp")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert ["preprocess off" in line for line in asked] == [True, False]
    assert not list((tmp_path / "tmp").iterdir())


@given(problems(), st.floats(-20, 20))
@settings(max_examples=200, deadline=None)
def test_a_cutoff_hides_nothing_better(problem, cutoff):
    truth = solve(problem, "brute")
    found = solve(problem, cutoff=cutoff)
    if truth.choice and truth.objective < cutoff - 1e-9:
        assert found.status == "optimal"
        assert math.isclose(found.objective, truth.objective, rel_tol=1e-9, abs_tol=1e-9)
    elif truth.choice and truth.objective > cutoff + 1e-9:
        assert found.status == "cutoff"


@given(problems())
@settings(max_examples=150, deadline=None)
def test_a_conflict_is_real_and_its_way_out_leads_out(problem):
    """The named limits alone are infeasible, fewer are not; each nearest value makes the whole problem feasible."""
    conflict = explain_infeasible(problem)
    truth = solve(problem, "brute")
    assert (conflict is None) == (truth.status != "infeasible")
    if conflict is None:
        return
    every = {*(limit.label for limit in problem.limits), "pins", "equal"}
    named = set(conflict.limits)
    assert solve(without(problem, every - named), "brute").status == "infeasible"
    for label in named:
        assert solve(without(problem, (every - named) | {label}), "brute").status == "optimal"
    for label, (side, value) in conflict.nearest.items():
        if side == "tolerance":
            assert problem.stages is not None
            moved = replace(problem, stages=replace(problem.stages, tolerance=value))
        else:
            number = {side: value}
            moved = replace(
                problem,
                constraints=tuple(replace(c, **number) if c.label == label else c for c in problem.constraints),
                counts=tuple(replace(c, **{side: int(value)}) if c.label == label else c for c in problem.counts),
            )
        assert solve(moved, "brute").status == "optimal"


@given(problems())
@settings(max_examples=60, deadline=None)
def test_looser_limits_never_cost(problem):
    found = solve(problem)
    if found.choice:
        assert all(price.objective <= found.objective for price in prices(problem, found))


@pytest.mark.parametrize("backend", ["ortools", "pulp"])
def test_tenths_add_up(backend):
    """Ten times 0.1 is 1: numbers are read as written."""
    variants = (
        Variant(name="dear", score=0.0, resources={"r": 0.1}),
        Variant(name="none", score=1.0, resources={"r": 0.0}),
    )
    layers = tuple(Layer(name=f"L{i}", variants=variants) for i in range(10))
    problem = Problem(layers=layers, constraints=(Constraint(resource="r", max=1.0),))
    assert solve(problem, backend).objective == 0.0


@given(problems())
@settings(max_examples=60, deadline=None)
def test_a_choice_that_changes_layer_by_layer_is_judged_as_a_whole_one(problem):
    now, found = Running(problem), set()
    now.begin({layer.name: layer.variants[0] for layer in problem.layers})
    for variants in itertools.product(*(layer.variants for layer in problem.layers)):
        for layer, variant in zip(problem.layers, variants, strict=True):
            now.put(layer.name, variant)
        found.add(now.holds())
        assert now.holds() == (not problem.violated(now.names()))
    assert not (now.is_hopeless() and True in found)
