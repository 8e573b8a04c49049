"""A problem written as JSON is read back as the same problem."""

from __future__ import annotations

import json

from puzzle.solver.jsonio import Diverse, parse_problem, write_problem
from puzzle.solver.problem import Constraint, Count, Layer, Pair, Problem, Stages, Variant


def test_round_trip():
    layers = tuple(
        Layer(
            name=f"L{i}",
            variants=tuple(Variant(name=n, score=0.1 * i, resources={"m": 1.0, "t": 2.0}) for n in ("a", "b")),
        )
        for i in range(3)
    )
    problem = Problem(
        layers=layers,
        constraints=(Constraint(resource="m", max=3.0), Constraint(resource="t", min=1.0, name="slow")),
        counts=(Count(name="few", cells=frozenset({("L0", "a")}), max=1),),
        pairs=(Pair(a=("L0", "a"), b=("L2", "b"), score=-0.5, resources={"t": 0.5}),),
        fixed={"m": 0.5},
        pins={"L1": ("b",)},
        equal=(("L0", "L2"),),
        stages=Stages(resource="t", count=2, tolerance=0.5),
    )
    value = json.loads(json.dumps(write_problem(problem, Diverse(count=2, min_distance=1))))
    assert parse_problem(value) == (problem, Diverse(count=2, min_distance=1))
