"""A problem written as JSON is read back as the same problem."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from puzzle.solver.jsonio import SCHEMA, Diverse, parse_problem
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


def write_problem(problem: Problem, diverse: Diverse | None = None) -> dict[str, Any]:
    """The JSON value that `parse_problem` reads back as the same problem."""
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "layers": [
            {
                "name": layer.name,
                "variants": [
                    {"name": v.name, "score": v.score, "resources": dict(v.resources)} for v in layer.variants
                ],
            }
            for layer in problem.layers
        ],
        "constraints": [{k: v for k, v in asdict(c).items() if v is not None} for c in problem.constraints],
        "pairs": [
            {"a": list(p.a), "b": list(p.b), "score": p.score, "resources": dict(p.resources)} for p in problem.pairs
        ],
    }
    if problem.counts:
        value["counts"] = [
            {"name": c.name, "cells": sorted(map(list, c.cells)), "min": c.min, "max": c.max} for c in problem.counts
        ]
    if problem.fixed:
        value["fixed"] = dict(problem.fixed)
    if problem.pins:
        value["pins"] = {layer: list(allowed) for layer, allowed in problem.pins.items()}
    if problem.equal:
        value["equal"] = [list(group) for group in problem.equal]
    if problem.stages is not None:
        value["stages"] = asdict(problem.stages)
    if diverse is not None:
        value["diverse"] = asdict(diverse)
    return value
