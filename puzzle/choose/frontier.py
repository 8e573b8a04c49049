"""The Pareto frontier of a library: the least sum of scores at each of many throughputs (or memories, or latencies).

OUT/frontier.csv grows a row a point, so that an interrupted run goes on; OUT/frontier.png when matplotlib is there.
"""

from __future__ import annotations

import csv
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from puzzle.base.console import progress
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, json_text, parse_json, read_json, write_json
from puzzle.base.lock import holding
from puzzle.choose.goal import AXES, BY_OPTION, Target
from puzzle.choose.problem import Selection
from puzzle.choose.solve import choose
from puzzle.parents.structure import Layer
from puzzle.solver.solution import Solution

FIELDS = ("value", "batch", "score", "tokens_per_second", "latency_seconds", "memory_bytes", "layers")


def library_frontier(selection: Selection, axis: str, count: int, out: Path) -> list[dict]:
    """`count` points on `axis` between the parent and the most extreme child. Returns the rows of frontier.csv.

    Values that no child reaches give no row. Raises UserError for an unknown axis or less than two points.
    """
    if axis not in AXES:
        raise UserError(f"`pareto` {axis}: use {', '.join(AXES)}")
    if count < 2:
        raise UserError(f"`points` {count}: a frontier has at least 2 points")
    values = _values(selection, axis, count)
    with holding(out):
        rows = _grown(selection, axis, values, out)
        rows.sort(key=lambda row: row["value"])
        draw(rows, axis, out / "frontier.png")
    return rows


def _grown(selection: Selection, axis: str, values: list[float], out: Path) -> list[dict]:
    """The rows of frontier.csv after those that were missing are there, in the order of the file."""
    costs, request, path = selection.costs, selection.request, out / "frontier.csv"
    how = [request.backend, request.time_limit, request.baseline, request.same_batch]
    posed = [asdict(selection.problem(batch)) for batch in selection.batches]
    key = content_hash([axis, values, costs.table.hash, how, posed])
    rows = _resume(out, key)
    with progress("frontier", len(values)) as bar, open(path, "a" if rows else "w", newline="") as handle:
        writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        write_json(
            out / "frontier.json",
            {"key": key, "axis": axis, "workload": asdict(selection.request.work), "costs": costs.facts},
        )
        had = {row["value"] for row in rows}

        def keep(value: float, batch: int, solution: Solution) -> None:
            cells = selection.chosen(solution)
            child = costs.predict([cell.sub_blocks for cell in cells], batch)
            row: dict[str, Any] = {
                "value": value,
                "batch": batch,
                "score": solution.objective,
                "tokens_per_second": child.tokens_per_second,
                "latency_seconds": child.latency_seconds,
                "memory_bytes": child.memory_bytes,
                "layers": [dict(cell.variants) for cell in cells],
            }
            writer.writerow(row | {"layers": json_text(row["layers"], indent=None)})
            handle.flush()
            rows.append(row)

        for value in values:
            if value not in had:
                batch, solutions = choose(_with(selection, axis, value))
                if batch is not None:
                    keep(value, batch, solutions[batch])
            bar.advance()
    return rows


def _with(selection: Selection, axis: str, value: float) -> Selection:
    """The selection with this limit on the axis."""
    limits = {**selection.goal.limits, axis: Target(value=value, relative=False)}
    return replace(selection, request=replace(selection.request, goal=replace(selection.goal, limits=limits)))


def _values(selection: Selection, axis: str, count: int) -> list[float]:
    costs, limit = selection.costs, BY_OPTION[axis]
    cheapest = [limit.own(costs.predict(_cheapest(selection), b)) for b in selection.batches]
    first, last = limit.own(selection.parent), (max if limit.larger else min)(cheapest)
    return [float(f"{first + (last - first) * n / (count - 1):.9g}") for n in range(count)]


def _cheapest(selection: Selection) -> list[Layer]:
    """Every layer's cell of least time and memory: the far end of every axis."""
    problem = selection.problem(selection.batches[0])
    picked = [
        min(la.variants, key=lambda v: (v.resources["seconds"], v.resources["memory_bytes"])) for la in problem.layers
    ]
    return [cells[v.name].sub_blocks for cells, v in zip(selection.cells, picked, strict=True)]


def _resume(out: Path, key: str) -> list[dict]:
    path, mark = out / "frontier.csv", out / "frontier.json"
    if not path.is_file() or not mark.is_file() or read_json(mark, "puzzle solve --pareto").get("key") != key:
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a killed run may have left half a line
    try:
        return _rows(path)
    except (KeyError, TypeError, ValueError):  # changed by something else: as if it was not there
        return []


def _rows(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as handle:
        return [
            {
                **{k: float(row[k]) for k in ("value", "score", "tokens_per_second", "latency_seconds")},
                **{k: int(row[k]) for k in ("batch", "memory_bytes")},
                "layers": parse_json(row["layers"]),
            }
            for row in csv.DictReader(handle)
        ]


def read_frontier(path: Path) -> tuple[list[dict], dict[str, Any]]:
    """The rows of a frontier.csv, and {"axis", "workload", "costs"} of what it is for; earlier versions did not say that."""
    mark = path.with_name("frontier.json")
    facts = read_json(mark, "puzzle solve --pareto") if mark.is_file() else {}
    return sorted(_rows(path), key=lambda row: row["value"]), facts


def draw(rows: list[dict], axis: str, path: Path) -> None:
    """A PNG of the frontier; nothing when matplotlib is not installed (extra `report`)."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot([r["value"] for r in rows], [r["score"] for r in rows], marker="o", markersize=3)
    axes.set_xlabel(f"{axis} limit, {AXES[axis]} (predicted)")
    axes.set_ylabel("sum of scores, nats/token")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def terminal_plot(rows: list[dict], axis: str, width: int = 64, height: int = 14) -> list[str]:
    """The frontier as text: score upwards, the limit to the right."""
    xs, ys = [r["value"] for r in rows], [r["score"] for r in rows]
    left, right, top = min(xs), max(xs), max(ys) or 1.0
    grid = [[" "] * width for _ in range(height)]
    for x, y in zip(xs, ys, strict=True):
        column = round((x - left) / (right - left) * (width - 1)) if right > left else 0
        grid[height - 1 - round(y / top * (height - 1))][column] = "●"
    lines = [f"{top * (height - 1 - n) / (height - 1):8.3g} │{''.join(line)}" for n, line in enumerate(grid)]
    lines.append(" " * 9 + "└" + "─" * width)
    lines.append(" " * 10 + f"{left:<{width // 2}.4g}{right:>{width // 2}.4g}")
    return [*lines, " " * 10 + f"{axis} limit, {AXES[axis]}, against the sum of scores in nats/token"]
