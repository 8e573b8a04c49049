"""Measure what variants of known shapes cost on this GPU: `puzzle profile --gpu h200 --shapes llama-3.1-8b`.

Every point is a chain of copies of one sub-block as a CUDA graph (blocklib/fast_profile.py). What depends on a number of
rows alone is measured by rows: FFNs, linear maps and heads carry context 0 in decode, and in prefill batch 1 with the number
of prompt tokens as context. Attention is measured by batch and context. Finished points stay in NAME.partial.csv, so that a
killed run goes on where it was; a point that does not fit in memory is recorded with no samples.
"""

from __future__ import annotations

import csv
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puzzle.base.console import progress
from puzzle.base.device import check_gpu
from puzzle.base.errors import writing
from puzzle.base.files import check_writable, write_json
from puzzle.blocklib.variant import parse_variant, search_space
from puzzle.kernels.timer import Timing
from puzzle.parents.known import Shapes, named_shapes
from puzzle.profile.cost_table import CostRow, append_costs, write_costs
from puzzle.profile.point import MAX_WEIGHT_BYTES, Point, Stage, Target
from puzzle.runtime.fast import random_module

SECONDS_PER_POINT = 0.1  # with compiling: 4,329 points took 443 s on an H100
Key = tuple[str, str, str, int, int]  # kind, shape, phase, batch, context


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuGrid:
    """What to measure. rows: of FFNs in prefill; prompts: (batch, length) of attention in prefill; wide: FFN widths as
    multiples of the parent's, what fusion makes. seconds: spent on a point."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    contexts: tuple[int, ...] = (128, 512, 2048, 4096, 8192, 32768, 131072)
    rows: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    prompts: tuple[tuple[int, int], ...] = tuple(
        (b, t) for b in (1, 4, 16, 64, 256) for t in (128, 512, 2048, 8192, 32768) if b * t <= 32768
    )
    wide: tuple[int, ...] = (2, 4, 8, 16)
    attention: str = "kv4,kv2,kv1,window-128,window-1024,linear"
    seconds: float = 0.025
    min_samples: int = 5


def profile_shapes(
    name: str,
    *,
    gpu: str,
    out: Path,
    grid: GpuGrid | None = None,
    device: str = "cuda",
    fp8: bool = False,
    shapes: Shapes | None = None,
    space: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Measure a parent's variants; write out/NAME.csv and NAME.json (conditions and drift). Returns its path and the latter.

    shapes, space: the parent and its variants by kind; by default the shapes that `name` stands for, and all of the grid's.
    fp8: weights of sub-blocks and cached keys and values in float8_e4m3fn; the files are called NAME-fp8.
    Raises UserError when `gpu` is not this machine's.
    """
    grid, shapes = grid or GpuGrid(), shapes or named_shapes(name)
    where = torch.device(device)
    if where.type == "cuda":
        check_gpu(gpu)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    stem = f"{name}-fp8" if fp8 else name
    path, partial = out / f"{stem}.csv", out / f"{stem}.partial.csv"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    stage = Stage(shapes, where, dtype, fp8, grid.seconds, grid.min_samples)
    done = _read_done(partial, stage.facts)
    begin, drift, measured = time.perf_counter(), [], 0
    targets = list(_targets(shapes, space or variants_of(shapes, grid), grid, where, dtype))
    conditions = [_conditions(where)]
    with progress("profile", sum(len(t.points) for t in targets)) as bar, torch.inference_mode():
        for target in targets:
            left = [p for p in target.points if (target.kind, target.shape, *p) not in done]
            bar.advance(len(target.points) - len(left))
            if not left:
                continue
            bar.note(f"{target.kind} {target.shape}")
            fits = stage.load(target)
            for phase, batch, context in left:
                point = stage.time(phase, batch, context) if fits else None
                append_costs(partial, _row(stage.facts, target, phase, batch, context, point))
                measured += 1
                bar.advance(1)
            drift.append(stage.reference())
    seconds = time.perf_counter() - begin
    rows = _read_rows(partial)
    write_costs(path, sorted(rows, key=lambda r: (r.kind, r.shape, r.phase, r.batch, r.context)))
    partial.unlink()
    conditions.append(_conditions(where))
    facts = {
        **stage.facts,
        "shapes": name,
        "points": len(rows),
        "measured_now": measured,
        "seconds": round(seconds, 1),
        "points_per_minute": round(60 * measured / seconds, 1),
        "reference_seconds": drift,
        "conditions": [c for c in conditions if c],
    }
    write_json(path.with_suffix(".json"), facts)
    return path, facts


def variants_of(shapes: Shapes, grid: GpuGrid) -> Mapping[str, Sequence[str]]:
    """The grid's attention variants that these shapes allow, and the default FFNs."""
    heads = shapes.spec.num_key_value_heads
    names = [
        name
        for name in grid.attention.split(",")
        if not name.startswith("kv") or (heads % int(name[2:]) == 0 and int(name[2:]) < heads)
    ]
    return search_space(shapes.spec, ",".join(names), None)  # type: ignore[return-value]


def count_points(shapes: Shapes, space: Mapping[str, Sequence[str]] | None = None) -> int:
    """How many points `profile_shapes` measures."""
    grid = GpuGrid()
    found = _targets(shapes, space or variants_of(shapes, grid), grid, torch.device("meta"), torch.bfloat16)
    return sum(len(target.points) for target in found)


def _targets(
    shapes: Shapes, space: Mapping[str, Sequence[str]], grid: GpuGrid, device: torch.device, dtype: torch.dtype
) -> Iterator[Target]:
    spec = shapes.spec
    seen = set()
    for kind in ("attention", "ffn"):
        for variant_name in space[kind]:
            variant = parse_variant(kind, variant_name, spec)  # type: ignore[arg-type]
            shape = variant.shape(spec)
            if shape == "none" or (kind, shape) in seen:
                continue
            seen.add((kind, shape))
            by_rows = kind == "ffn" or "linear" in shape

            def make(kind: str = kind, name: str = variant_name) -> Any:
                return random_module(kind, name, spec, device, dtype)

            yield _with_points(Target(kind, shape, by_rows, make), grid, shapes)
    for times in grid.wide:
        width = times * spec.intermediate_size
        if 3 * spec.hidden_size * width * dtype.itemsize <= MAX_WEIGHT_BYTES // 2:

            def make_wide(times: int = times) -> Any:
                return random_module("ffn", f"x{times}", spec, device, dtype)

            yield _with_points(Target("ffn", f"h{spec.hidden_size} f{width}", True, make_wide), grid, shapes)
    head_shape = f"h{spec.hidden_size} v{shapes.vocab_size}"

    def make_head() -> Any:
        return torch.randn(shapes.vocab_size, spec.hidden_size, device=device).to(dtype)

    for kind in ("embedding", "head"):
        target = Target(kind, head_shape, True, make_head)
        target.points = [("decode", b, 0) for b in grid.batches]
        yield target


def _with_points(target: Target, grid: GpuGrid, shapes: Shapes) -> Target:
    longest = shapes.max_length
    if target.by_rows:
        target.points = [("decode", b, 0) for b in grid.batches] + [("prefill", 1, n) for n in grid.rows]
    else:
        contexts = sorted({min(c, longest) for c in grid.contexts})
        target.points = [("decode", b, c) for c in contexts for b in grid.batches]
        target.points += [("prefill", b, t) for b, t in grid.prompts if t <= longest]
    return target


def _row(
    facts: Mapping[str, str], target: Target, phase: str, batch: int, context: int, point: Point | None
) -> CostRow:
    """point None: it did not fit in memory, which a row without samples says."""
    found = point or Point(timing=Timing(p20=0.0, p50=0.0, p80=0.0, num_samples=0), workspace=0)
    return CostRow(
        kind=target.kind,
        shape=target.shape,
        phase=phase,
        batch=batch,
        context=context,
        dtype=facts["dtype"],
        p20_s=found.timing.p20,
        p50_s=found.timing.p50,
        p80_s=found.timing.p80,
        num_samples=found.timing.num_samples,
        workspace_bytes=found.workspace,
        device=facts["device"],
        versions=facts["versions"],
        date=facts["date"],
    )


def _conditions(device: torch.device) -> str:
    """Clocks, temperature and power as nvidia-smi reports them."""
    if device.type != "cuda":
        return ""
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def _read_rows(path: Path) -> list[CostRow]:
    """Rows of a table, a last half-written line left out."""
    rows = []
    with open(path, newline="", encoding="utf-8") as handle:
        for raw in csv.DictReader(handle):
            try:
                values: dict[str, Any] = dict(raw)
                values |= {k: int(raw[k]) for k in ("batch", "context", "num_samples", "workspace_bytes")}
                values |= {k: float(raw[k]) for k in ("p20_s", "p50_s", "p80_s")}
                if raw["date"]:
                    rows.append(CostRow(**values))
            except (KeyError, TypeError, ValueError):
                continue
    return rows


def _read_done(partial: Path, facts: dict[str, str]) -> set[Key]:
    """Points that an interrupted run on the same device finished."""
    if not partial.is_file():
        return set()
    rows = [r for r in _read_rows(partial) if r.device == facts["device"] and r.dtype == facts["dtype"]]
    write_costs(partial, rows)
    return {(r.kind, r.shape, r.phase, r.batch, r.context) for r in rows}
