"""Means of few documents with 95 % intervals that do not vanish where all documents agree."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

Z = 1.96


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "low", "high"} of scores in [0, 1]: two documents won and two lost are added (Agresti and Coull, 1998); others as they are."""
    bounded = all(0 <= value <= 1 for value in values)
    return _interval(values, (0.0, 0.0, 1.0, 1.0) if bounded else (), (0.0, 1.0) if bounded else None)


def difference_interval(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """Of after − before, document by document: one won and one lost are added (Bonett and Price, 2012)."""
    bounded = all(0 <= value <= 1 for value in (*before, *after))
    each = [new - old for old, new in zip(before, after, strict=True)]
    return _interval(each, (-1.0, 1.0) if bounded else (), (-1.0, 1.0) if bounded else None)


def around(value: float, error: float | None) -> dict[str, float | None]:
    """Of a value with its standard error; without one no interval is known."""
    spread = (None, None) if error is None else (value - Z * error, value + Z * error)
    return {"mean": value, "low": spread[0], "high": spread[1]}


def _interval(
    values: Sequence[float], added: tuple[float, ...], within: tuple[float, float] | None
) -> dict[str, float]:
    more = [*values, *added]
    center = sum(more) / len(more)
    spread = sum((value - center) ** 2 for value in more) / max(1, len(more) - (not added))
    half = Z * sqrt(spread / len(more))
    low, high = center - half, center + half
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    return {"mean": sum(values) / len(values), "low": low, "high": high}
