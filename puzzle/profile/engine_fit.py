"""Fit an engine's constants to measured serving figures: `puzzle profile --engine vllm --gpu h100 --fit FILE.csv`.

FILE.csv has a row per measurement: architecture, num_seqs, input_len, output_len and decode_step_ms or output_tokens_per_s
(or both); architectures.json beside it says what each architecture is made of. Levenberg-Marquardt on relative errors, in
the logarithms of the constants, drawn to their usual values by a weak prior (Levenberg 1944, Marquardt 1963).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.base.errors import UserError
from puzzle.base.files import write_json
from puzzle.base.workload import Workload
from puzzle.profile.engine import Constants, EngineModel, parts_of, read_architectures

PRIOR = 0.02  # relative error that a constant e-fold away from its usual value is worth
MAX_STEPS = 200
WHAT = ("decode_step", "throughput")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """value: seconds of a decode step, or output tokens per second of the whole batch, prefill included."""

    architecture: str
    what: str
    batch: int
    work: Workload
    value: float


def read_measurements(path: Path, known: Sequence[str]) -> list[Measurement]:
    """Raises UserError for a missing column, a value that is no positive number, or an unknown architecture."""
    found = []
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            for number, row in enumerate(csv.DictReader(handle), 2):
                found += _row(path, number, row, known)
    except OSError as error:
        raise UserError(f"`fit` {path} cannot be read ({error.strerror}): give a CSV of measurements") from error
    if len(found) < 8:
        raise UserError(f"`fit` {path} has {len(found)} measurements: eight constants need at least 8")
    return found


def _row(path: Path, number: int, row: dict[str, str], known: Sequence[str]) -> list[Measurement]:
    try:
        name, batch = row["architecture"], int(row["num_seqs"])
        work = Workload(input_len=int(row["input_len"]), output_len=int(row["output_len"]))
        values = [row["decode_step_ms"] or "", row["output_tokens_per_s"] or ""]
        numbers = [float(text) * scale if text else None for text, scale in zip(values, (1e-3, 1.0), strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"`fit` {path} line {number} is broken ({error}): see puzzle/profile/engine_fit.py") from error
    if name not in known:
        raise UserError(f"`fit` {path} line {number}: architecture '{name}' is not in architectures.json beside it")
    if batch < 1 or any(v is not None and not 0 < v < math.inf for v in numbers):
        raise UserError(f"`fit` {path} line {number}: counts and times must be above 0")
    return [
        Measurement(architecture=name, what=what, batch=batch, work=work, value=value)
        for what, value in zip(WHAT, numbers, strict=True)
        if value is not None
    ]


def predicted(model: EngineModel, parts: dict[str, Any], one: Measurement) -> float:
    """What the model says of a measurement of the architecture `parts`."""
    counted = parts_of(parts)
    work, batch = one.work, one.batch
    if one.what == "decode_step":
        context = work.input_len + work.output_len // 2
        return sum(n * model.seconds(part, "decode", batch, context) for part, n in counted)
    total = sum(
        n * (model.seconds(part, "prefill", batch, work.input_len) + model.decode_seconds(part, batch, work))
        for part, n in counted
    )
    return batch * work.output_len / total


def fit(engine: str, described: dict[str, Any], measured: Sequence[Measurement]) -> EngineModel:
    """The constants of least squared relative error."""
    usual = np.log(np.array(list(asdict(Constants()).values())))
    names = list(asdict(Constants()))

    def model(x: np.ndarray) -> EngineModel:
        constants = Constants(**dict(zip(names, np.exp(x).tolist(), strict=True)))
        return EngineModel(
            engine, described["gpu"], constants, device=described["device"], precision=described["precision"]
        )

    def residuals(x: np.ndarray) -> np.ndarray:
        now = model(x)
        errors = [math.log(predicted(now, described["architectures"][m.architecture], m) / m.value) for m in measured]
        return np.concatenate([errors, PRIOR * (x - usual)])

    x, damping = usual, 1e-3
    error = residuals(x)
    for _ in range(MAX_STEPS):
        slope = np.stack([(residuals(x + 1e-6 * unit) - error) / 1e-6 for unit in np.eye(len(x))], axis=1)
        normal = slope.T @ slope
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope.T @ error)
        trial = residuals(x + step)
        if trial @ trial < error @ error:
            done = error @ error - trial @ trial < 1e-12
            x, error, damping = x + step, trial, damping / 3
            if done:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return model(x)


def compared(model: EngineModel, described: dict[str, Any], measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    """What the model says beside what was measured: a row per measurement."""
    rows = []
    for m in measured:
        error = predicted(model, described["architectures"][m.architecture], m) / m.value - 1
        scenario = {"what": m.what, "num_seqs": m.batch, **asdict(m.work)}
        row = {"architecture": m.architecture, **scenario, "measured": m.value, "predicted": m.value * (1 + error)}
        rows.append(row)
    return rows


def leave_one_out(engine: str, described: dict[str, Any], measured: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Each architecture predicted by a fit on the others: a row per measurement."""
    rows = []
    for name in described["architectures"]:
        held = [m for m in measured if m.architecture == name]
        rest = [m for m in measured if m.architecture != name]
        if held and rest:
            rows += compared(fit(engine, described, rest), described, held)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and largest absolute relative error per kind, and the share of pairs of architectures ranked right."""
    found: dict[str, Any] = {}
    for what in WHAT:
        errors = [abs(r["predicted"] / r["measured"] - 1) for r in rows if r["what"] == what]
        if errors:
            found[what] = {"mean": sum(errors) / len(errors), "largest": max(errors), "num": len(errors)}
    scenarios: dict[tuple, list[tuple[float, float]]] = {}
    for r in rows:
        key = (r["what"], r["num_seqs"], r["input_len"], r["output_len"])
        scenarios.setdefault(key, []).append((r["measured"], r["predicted"]))
    pairs = [(a, b) for group in scenarios.values() for a, b in combinations(group, 2)]
    right = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    return found | {"pairs_ranked_right": right, "pairs": len(pairs)}


def fit_engine(engine: str, path: Path, out: Path | None = None, *, gpu: str) -> dict[str, Any]:
    """Fit, check by leaving one architecture out at a time, write `out` (default: fit.json beside the CSV).

    Raises UserError for broken input, or when the figures come from another GPU than `gpu`.
    """
    described = read_architectures(path.with_name("architectures.json"))
    if described["gpu"] != gpu:
        raise UserError(f"`fit` {path} was measured on {described['gpu']}, not on {gpu}: pass `gpu` {described['gpu']}")
    measured = read_measurements(path, list(described["architectures"]))
    model = fit(engine, described, measured)
    rows = leave_one_out(engine, described, measured)
    value = {
        "engine": engine,
        **{key: described[key] for key in ("gpu", "device", "versions", "precision", "date")},
        "constants": asdict(model.constants),
        "errors": summary(compared(model, described, measured)),
        "leave_one_out": summary(rows),
    }
    write_json(out or path.with_name("fit.json"), value)
    return value | {"rows": rows}
