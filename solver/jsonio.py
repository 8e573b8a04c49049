"""Problems and solutions as small JSON files, for libraries that are not ours.

problem.json: {"schema": 1,
 "layers": [{"name": "L00", "variants": [{"name": "a", "score": 0.1, "resources": {"memory": 1.0, "runtime": 2.0}}]}],
 "constraints": [{"resource": "memory", "max": 80000.0}],                      "min", "max", "name" optional
 "pairs": [{"a": ["L00", "a"], "b": ["L01", "b"], "score": 0.0, "resources": {"runtime": -0.1}}],
 "diverse": {"count": 3, "min_distance": 20},
 and optionally
 "fixed": {"memory": 5.0},
 "counts": [{"name": "attention", "cells": [["L00", "a"]], "min": 8}],
 "pins": {"L00": ["a"]}, "equal": [["L00", "L01"]],
 "stages": {"resource": "runtime", "count": 4, "tolerance": 0.05}}

solution.json: {"schema": 1, "solutions": [{"status", "objective", "bound", "gap", "choice", "totals", "slack", "seconds",
 "solver"}], "conflict": null or {"limits": [...], "nearest": {"memory": {"side": "max", "value": 83.1}}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle.base.files import finite
from puzzle.solver.explain import Conflict
from puzzle.solver.problem import Constraint, Count, Layer, Pair, Problem, ProblemError, Stages, Variant
from puzzle.solver.solution import Solution

SCHEMA = 1
_PROBLEM = {"schema", "layers", "constraints", "pairs", "diverse", "fixed", "counts", "pins", "equal", "stages"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Diverse:
    count: int
    min_distance: int


def read_problem(path: Path) -> tuple[Problem, Diverse | None]:
    """Raises ProblemError for a file that cannot be read, is not JSON, or holds a field that is missing, unknown or wrong."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path} cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise ProblemError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise ProblemError(f"{path} is not JSON that can be read ({error})") from error
    return parse_problem(raw, str(path))


def parse_problem(raw: Any, where: str = "problem") -> tuple[Problem, Diverse | None]:
    """The problem of a JSON value; where: how messages call it."""
    fields = _object(raw, where, _PROBLEM, {"schema", "layers"})
    if fields["schema"] != SCHEMA:
        raise ProblemError(f"{where}: schema is {fields['schema']!r}, this version reads {SCHEMA}")
    layers = tuple(_layer(layer, f"{where} layers[{n}]") for n, layer in enumerate(_list(raw, "layers", where)))
    constraints = tuple(
        Constraint(**_object(c, f"{where} constraints[{n}]", {"resource", "min", "max", "name"}, {"resource"}))
        for n, c in enumerate(_list(raw, "constraints", where))
    )
    stages = fields.get("stages")
    known = {"resource", "count", "tolerance", "name"}
    problem = Problem(
        layers=layers,
        constraints=constraints,
        counts=tuple(_count(c, f"{where} counts[{n}]") for n, c in enumerate(_list(raw, "counts", where))),
        pairs=tuple(_pair(p, f"{where} pairs[{n}]") for n, p in enumerate(_list(raw, "pairs", where))),
        fixed=_mapping(fields.get("fixed"), f"{where} fixed"),
        pins={k: tuple(v) for k, v in _mapping(fields.get("pins"), f"{where} pins").items()},
        equal=tuple(tuple(group) for group in _list(raw, "equal", where)),
        stages=Stages(**_object(stages, f"{where} stages", known, known - {"name"})) if stages is not None else None,
    )
    if fields.get("diverse") is None:
        return problem, None
    wanted = _object(fields["diverse"], f"{where} diverse", {"count", "min_distance"}, {"count", "min_distance"})
    return problem, Diverse(**wanted)


def write_solutions(solutions: list[Solution], conflict: Conflict | None = None) -> dict[str, Any]:
    """solution.json's value. JSON has no infinity: it is written as null."""
    return {
        "schema": SCHEMA,
        "solutions": [finite(asdict(solution)) for solution in solutions],
        "conflict": None
        if conflict is None
        else {
            "limits": list(conflict.limits),
            "nearest": {k: {"side": side, "value": value} for k, (side, value) in conflict.nearest.items()},
        },
    }


def _layer(raw: Any, where: str) -> Layer:
    fields = _object(raw, where, {"name", "variants"}, {"name", "variants"})
    variants = []
    for n, item in enumerate(_list(raw, "variants", where)):
        at = f"{where} variants[{n}]"
        variant = _object(item, at, {"name", "score", "resources"}, {"name", "score"})
        resources = _mapping(variant.get("resources"), f"{at} resources")
        variants.append(Variant(name=_text(variant["name"], at), score=variant["score"], resources=resources))
    return Layer(name=_text(fields["name"], where), variants=tuple(variants))


def _pair(raw: Any, where: str) -> Pair:
    fields = _object(raw, where, {"a", "b", "score", "resources"}, {"a", "b"})
    resources = _mapping(fields.get("resources"), f"{where} resources")
    return Pair(
        a=_cell(fields["a"], where), b=_cell(fields["b"], where), score=fields.get("score", 0.0), resources=resources
    )


def _count(raw: Any, where: str) -> Count:
    fields = _object(raw, where, {"name", "cells", "min", "max"}, {"name", "cells"})
    cells = frozenset(_cell(cell, where) for cell in _list(raw, "cells", where))
    return Count(name=_text(fields["name"], where), cells=cells, min=fields.get("min"), max=fields.get("max"))


def _cell(raw: Any, where: str) -> tuple[str, str]:
    if not (isinstance(raw, list) and len(raw) == 2 and all(isinstance(x, str) for x in raw)):
        raise ProblemError(f'{where}: {raw!r} is no cell; write ["layer", "variant"]')
    return raw[0], raw[1]


def _text(raw: Any, where: str) -> str:
    if not isinstance(raw, str):
        raise ProblemError(f"{where}: name is {raw!r}, it must be a text")
    return raw


def _object(raw: Any, where: str, known: set[str], needed: set[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ProblemError(f"{where} is {raw!r}: it must be an object")
    if unknown := sorted(set(raw) - known):
        raise ProblemError(f"{where}: unknown field '{unknown[0]}'; known are {', '.join(sorted(known))}")
    if missing := sorted(needed - set(raw)):
        raise ProblemError(f"{where}: field '{missing[0]}' is missing")
    return raw


def _list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, list):
        raise ProblemError(f"{where}: '{key}' is {value!r}, it must be a list")
    return value or []


def _mapping(raw: Any, where: str) -> dict[str, Any]:
    if raw is not None and not isinstance(raw, dict):
        raise ProblemError(f"{where} is {raw!r}: it must be an object")
    return raw or {}
