"""Fit an engine's constants to measured serving figures: `puzzle profile --engine vllm --gpu h100 --fit FILE.csv`.

FILE.csv has a row per measurement, of which the fastest of a point counts: architecture, num_seqs, input_len, output_len and any of decode_step_ms, prefill_ms (of all prompts
together) and output_tokens_per_s; architectures.json beside it says what each architecture is made of. Levenberg-Marquardt on relative
errors (Levenberg 1944, Marquardt 1963), in the logarithms of the constants and, of shares, which no engine has more than 1 of, in those
of the odds, drawn to their usual values by a weak prior; none falls below LEAST. An error far above HICCUP counts by its logarithm (Black &
Rangarajan 1996, Lorentzian), so that one run that something held up spoils no constant.

Whether the engine's own Python sets the pace anywhere is found by fitting twice, without its two constants and with them, from the
line below all decode steps over the batch: they stay where they lower Schwarz's criterion (1978) of the decode steps, else there is
nothing that shows them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from puzzle.base.errors import UserError
from puzzle.base.files import write_json
from puzzle.base.workload import Workload
from puzzle.blocklib.sub_block import SubBlock
from puzzle.profile.engine import SHARES, Constants, EngineModel, larger, parts_of, read_architectures
from puzzle.profile.parts import Part

PRIOR = 0.02  # relative error that a constant e-fold away from its usual value is worth
HICCUP = 0.1  # relative error
MAX_STEPS = 200
MOST = 2**16  # sequences at once: `solve` looks at every batch up to the largest that was measured
COLUMNS = {
    "decode_step": ("decode_step_ms", 1e-3),
    "prefill": ("prefill_ms", 1e-3),
    "throughput": ("output_tokens_per_s", 1.0),
}
WHAT = tuple(COLUMNS)
HOST = ("host", "host_sequence")
USUAL = {"tail": 64.0}
LEAST = {"attention": 6e-6, "ffn": 4e-6}  # seconds: six and four kernels, of which none takes less than a microsecond
USUAL_PREFILL = {"request": 5e-5, "launch": 1e-4}  # seconds, where prefills were measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """value: seconds of a decode step or of all prompts, or output tokens per second of the whole batch, prefill included."""

    architecture: str
    what: str
    batch: int
    work: Workload
    value: float


class Remembering(EngineModel):
    """Architectures share most of their sub-blocks: each is asked about once for a shape."""

    @cached_property
    def _told(self) -> dict[tuple[Part, str, int, int], float]:
        return {}

    def seconds(self, part: Part, phase: str, batch: int, context: int) -> float:
        asked = (part, phase, batch, context)
        if asked not in self._told:
            self._told[asked] = super().seconds(*asked)
        return self._told[asked]


def read_measurements(path: Path, known: Sequence[str]) -> list[Measurement]:
    """Raises UserError for a missing column, a value that is no positive number, or an unknown architecture."""
    found = []
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            for number, row in enumerate(csv.DictReader(handle), 2):
                found += _row(path, number, row, known)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"`fit` {path} cannot be read ({told}): give a CSV of measurements, in UTF-8") from error
    if len(found) < 8:
        raise UserError(f"`fit` {path} has {len(found)} measurements: the constants need at least 8")
    return _fastest(found)


def _fastest(measured: Sequence[Measurement]) -> list[Measurement]:
    """Of several measurements of one point: whatever else ran beside one made it slower."""
    found: dict[tuple, Measurement] = {}
    for m in measured:
        key, slow = (m.architecture, m.what, m.batch, m.work), m.what != "throughput"
        if key not in found or (m.value < found[key].value) == slow:
            found[key] = m
    return list(found.values())


def _row(path: Path, number: int, row: dict[str, str], known: Sequence[str]) -> list[Measurement]:
    try:
        name, batch = row["architecture"], int(row["num_seqs"])
        work = Workload(input_len=int(row["input_len"]), output_len=int(row["output_len"]))
        row["decode_step_ms"], row["output_tokens_per_s"]  # columns that are always there
        numbers = [float(row[name]) * scale if row.get(name) else None for name, scale in COLUMNS.values()]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"`fit` {path} line {number} is broken ({error}): see puzzle/profile/engine_fit.py") from error
    if name not in known:
        raise UserError(f"`fit` {path} line {number}: architecture '{name}' is not in architectures.json beside it")
    if not 1 <= batch <= MOST or any(v is not None and not 0 < v < math.inf for v in numbers):
        raise UserError(f"`fit` {path} line {number}: counts and times must be above 0, and num_seqs {MOST} at most")
    return [
        Measurement(architecture=name, what=what, batch=batch, work=work, value=value)
        for what, value in zip(WHAT, numbers, strict=True)
        if value is not None
    ]


def predicted(model: EngineModel, parts: dict[str, Any], one: Measurement) -> Any:
    """What the model says of a measurement of the architecture `parts`; an array where its constants are arrays."""
    counted = parts_of(parts)
    work, batch = one.work, one.batch
    if one.what == "decode_step":
        context = work.input_len + work.output_len // 2
        device = sum(n * model.seconds(part, "decode", batch, context) for part, n in counted)
        return larger(device, model.host_seconds(batch))
    prefill = sum(n * model.seconds(part, "prefill", batch, work.input_len) for part, n in counted)
    if one.what == "prefill":
        return prefill
    decode = sum(n * model.decode_seconds(part, batch, work) for part, n in counted)
    return batch * work.output_len / (prefill + larger(decode, (work.output_len - 1) * model.host_seconds(batch)))


def fit(engine: str, described: dict[str, Any], measured: Sequence[Measurement]) -> EngineModel:
    """The constants of least squared relative error; those of the host are 0 where they do not show."""
    start = asdict(Constants()) | USUAL
    if any(m.what == "prefill" for m in measured):
        start |= USUAL_PREFILL
    without = _least(engine, described, measured, start)
    if (floor := _floor(measured)) is None:
        return without
    paced = _least(engine, described, measured, start | dict(zip(HOST, floor, strict=True)))

    steps = [m for m in measured if m.what == "decode_step"]

    def criterion(model: EngineModel, num_constants: int) -> float:
        error = float((_errors(model, described, steps) ** 2).sum())
        return len(steps) * math.log(error or 1e-300) + num_constants * math.log(len(steps))

    return paced if criterion(paced, len(HOST)) < criterion(without, 0) else without


def has_windows(described: dict[str, Any]) -> bool:
    """Whether any of the architectures has sub-blocks with a window."""
    parts = [part for entry in described["architectures"].values() for part, _ in parts_of(entry)]
    return any(isinstance(part, SubBlock) and part.state().reach is not None for part in parts)


def _errors(model: EngineModel, described: dict[str, Any], measured: Sequence[Measurement]) -> np.ndarray:
    """Relative, in logarithms, of every measurement [M], or of every measurement and column of the constants [M, C]. The square of one
    grows by the logarithm beyond HICCUP."""
    told = np.array([predicted(model, described["architectures"][m.architecture], m) / m.value for m in measured])
    errors = np.log(told)
    return np.copysign(HICCUP * np.sqrt(np.log1p((errors / HICCUP) ** 2)), errors)


def _floor(measured: Sequence[Measurement]) -> tuple[float, float] | None:
    """Seconds per step and per sequence that no decode step is below: the least measured at every batch, by least squares. None for
    steps of fewer than three batches, of which a line says nothing."""
    least: dict[int, float] = {}
    for m in measured:
        if m.what == "decode_step":
            least[m.batch] = min(m.value, least.get(m.batch, math.inf))
    if len(least) < 3:
        return None
    # relative errors: a step of one sequence counts as much as one of many
    weights = 1 / np.array(list(least.values()))
    line = np.stack([weights, weights * np.array(list(least))], axis=1)
    (step, sequence), *_ = np.linalg.lstsq(line, np.ones(len(least)), rcond=None)
    return max(float(step), 1e-5), max(float(sequence), 1e-7)


def _least(
    engine: str, described: dict[str, Any], measured: Sequence[Measurement], start: dict[str, float]
) -> EngineModel:
    """Of all constants of `start` that are above 0; the others stay 0."""
    names = [name for name, value in start.items() if value > 0]
    odds = np.array([name in SHARES for name in names])
    usual, least = (np.array([d.get(name, 0.0) for name in names]) for d in (start, LEAST))
    usual = np.log(usual / np.where(odds, 1 - usual, 1.0))
    largest, windows = max(m.batch for m in measured), has_windows(described)

    def model(x: np.ndarray) -> EngineModel:
        """x: coordinates [C], or columns of them [C, N], for which every second that the model gives is an array [N]."""
        values = np.maximum(least, np.exp(x.T) / np.where(odds, 1 + np.exp(x.T), 1.0)).T
        constants = Constants(**start | dict(zip(names, values.tolist() if x.ndim == 1 else values, strict=True)))
        told = {key: described[key] for key in ("device", "precision")} | {"windows": windows}
        return Remembering(engine, described["gpu"], constants, largest_batch=largest, **told)

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([_errors(model(x), described, measured), PRIOR * (x.T - usual).T])

    x, damping = usual, 1e-3
    error = residuals(x)
    for _ in range(MAX_STEPS):
        slope = (residuals(x[:, None] + 1e-6 * np.eye(len(x))) - error[:, None]) / 1e-6
        normal = slope.T @ slope
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope.T @ error)
        trial = residuals(x + step)
        if trial @ trial < error @ error:
            done = error @ error - trial @ trial < 1e-12 + 1e-6 * (trial @ trial)
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


def leave_one_out(
    model: EngineModel, described: dict[str, Any], measured: Sequence[Measurement]
) -> list[dict[str, Any]]:
    """Each architecture predicted by a fit on the others: a row per measurement. model: fitted on all of them. One without which
    nothing shows the host's pace is there to measure that alone, and is not left out."""
    rows, paced = [], model.constants.host > 0
    for name in described["architectures"]:
        held = [m for m in measured if m.architecture == name]
        rest = [m for m in measured if m.architecture != name]
        if held and rest and ((others := fit(model.engine, described, rest)).constants.host > 0) == paced:
            rows += compared(others, described, held)
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
    rows = leave_one_out(model, described, measured)
    value = {
        "engine": engine,
        **{key: described[key] for key in ("gpu", "device", "versions", "precision", "date")},
        "largest_batch": model.batches[-1],
        "room_bytes": described.get("room_bytes"),
        "format": described.get("format", "nemotron-nas"),
        "windows": model.windows,
        "constants": asdict(model.constants),
        "errors": summary(compared(model, described, measured)),
        "leave_one_out": summary(rows),
    }
    write_json(out or path.with_name("fit.json"), value)
    return value | {"rows": rows}
