"""The selection problem: one variant per layer, least total score, resources within limits.

Data: layers i, variants j of layer i with score s_ij and resources r_ijk; fixed amounts f_k of what no choice changes;
limits lo_k <= f_k + Σ_i r_{i,x(i),k} <= hi_k. Variables: the choice x(i). Objective: Σ_i s_{i,x(i)}, minimised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction


class ProblemError(ValueError):
    """The problem's data are unusable: one line with the cell, its value and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    name: str
    score: float
    resources: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    name: str
    variants: tuple[Variant, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """min <= total of `resource` <= max; None leaves a side open. name: how messages call it."""

    resource: str
    min: float | None = None
    max: float | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        return self.name or self.resource


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Raises ProblemError for missing, duplicate, NaN or infinite data."""

    layers: tuple[Layer, ...]
    constraints: tuple[Constraint, ...] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ProblemError("the problem has no layers: give at least one")
        _unique([layer.name for layer in self.layers], "layer")
        _unique([c.label for c in self.constraints], "constraint")
        wanted = {c.resource for c in self.constraints}
        for layer in self.layers:
            if not layer.variants:
                raise ProblemError(f"layer {layer.name} has no variants: give at least one")
            _unique([v.name for v in layer.variants], f"variant of layer {layer.name}")
            for variant in layer.variants:
                where = f"layer {layer.name} variant {variant.name}"
                _finite(variant.score, f"{where} score")
                for resource, value in variant.resources.items():
                    _finite(value, f"{where} {resource}")
                if missing := wanted - set(variant.resources):
                    raise ProblemError(
                        f"{where} has no {sorted(missing)[0]}: every variant needs each limited resource"
                    )
        for resource, value in self.fixed.items():
            _finite(value, f"fixed {resource}")
        for constraint in self.constraints:
            for side in (constraint.min, constraint.max):
                if side is not None:
                    _finite(side, f"limit {constraint.label}")

    @property
    def resources(self) -> list[str]:
        """Names that every variant has, in the order of the first."""
        first = self.layers[0].variants[0].resources
        return [r for r in first if all(r in v.resources for layer in self.layers for v in layer.variants)]

    def totals(self, choice: Mapping[str, str]) -> dict[str, Fraction]:
        """Exact totals of every resource and of "score" under `choice` {layer: variant}."""
        picked = [next(v for v in layer.variants if v.name == choice[layer.name]) for layer in self.layers]
        sums = {
            r: Fraction(self.fixed.get(r, 0.0)) + sum(Fraction(v.resources[r]) for v in picked) for r in self.resources
        }
        return {**sums, "score": sum((Fraction(v.score) for v in picked), Fraction(0))}

    def violated(self, choice: Mapping[str, str]) -> list[str]:
        """Labels of the constraints that `choice` breaks, in exact arithmetic."""
        totals = self.totals(choice)
        return [
            c.label
            for c in self.constraints
            if (c.max is not None and totals[c.resource] > Fraction(c.max))
            or (c.min is not None and totals[c.resource] < Fraction(c.min))
        ]


def _unique(names: list[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ProblemError(f"two things are called {what} '{name}': names must differ")


def _finite(value: float, where: str) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ProblemError(f"{where} is {value!r}: it must be a finite number")
