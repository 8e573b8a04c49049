"""`puzzle profile`: measure what the parts of a parent and their alternatives cost on a machine, and write the cost table.

One function for every machine; `cpu.CpuTimer` and `gpu.GpuTimer` time single points. Finished points stay in NAME.partial.csv, so
that a killed run goes on where it was; a point that does not fit in memory is recorded with no samples.
"""

from __future__ import annotations

import csv
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from puzzle.base.console import progress
from puzzle.base.device import check_gpu
from puzzle.base.errors import UserError, writing
from puzzle.base.files import check_writable, write_json
from puzzle.base.units import check_positive
from puzzle.blocklib.sub_block import SubBlock
from puzzle.kernels.timer import Timing
from puzzle.library.manifest import Library
from puzzle.parents.structure import Structure
from puzzle.profile.cost_table import CostRow, append_costs, write_costs
from puzzle.profile.cpu import CpuTimer
from puzzle.profile.gpu import GpuTimer
from puzzle.profile.grid import At, Grid, Target, cpu_grid, gpu_grid, offered_by, targets
from puzzle.profile.parts import shared_name

STEADY = 1.1  # the slowest over the fastest of a fixed piece of work through a round: no further round is needed
# On a GPU, with compiling: 4,329 points took 443 s on an H100, with graphs of 1 ms. Those of 4 ms add 11 ms of replays, and as much in
# the capture of longer ones (computed).
SECONDS_PER_POINT = 0.12


class Timer(Protocol):
    """facts: device, versions, precision and date of its figures, as a `CostRow` names them."""

    facts: dict[str, str]

    def load(self, target: Target) -> bool:
        """Make ready for points of `target`; False when it does not fit in memory."""

    def time(self, at: At) -> tuple[Timing, int] | None:
        """The time of one call and its workspace in bytes (0 where nobody counts); None when it does not fit in memory."""

    def reference(self) -> float:
        """Seconds of a fixed piece of work: drift shows here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is profiled. offered: (slot, sub-block) of all that a child may have."""

    name: str
    structure: Structure
    offered: tuple[tuple[str, SubBlock], ...]

    def share(self, tp: int) -> Subject:
        """What one of `tp` ranks runs of it. Raises UserError for a part that cannot be shared by so many."""
        if tp == 1:
            return self
        own = dict.fromkeys((slot, sub_block.shared(tp)) for slot, sub_block in self.offered)
        return Subject(name=shared_name(self.name, tp), structure=self.structure.share(tp), offered=tuple(own))


def subject_of(library: Library) -> Subject:
    """A library's parent, or its origin, with the library's variants."""
    offered = dict.fromkeys((s, b) for space in library.spaces for s, names in space.items() for b in names.values())
    return Subject(name=library.name, structure=library.origin, offered=tuple(offered))


def subject_named(name: str, structure: Structure, tp: int = 1) -> Subject:
    """A parent without a library, with every alternative that is offered by default, and some more, as far as `tp` ranks can share it."""
    offered = (one for one in offered_by(structure) if tp == 1 or one[1].can_share(tp))
    return Subject(name=name, structure=structure, offered=tuple(offered))


@dataclass(kw_only=True, slots=True)
class ProfileOptions:
    """gpu: "cpu", or this machine's GPU. precision: of weights and caches. The rest as `grid.Grid` has it; None: as is usual there. prefill: prompt lengths."""

    gpu: str = "cpu"
    precision: str | None = None
    batches: tuple[int, ...] | None = None
    prefill: tuple[int, ...] | None = None
    contexts: tuple[int, ...] | None = None
    seconds: float | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "batches", "prefill", "contexts", "seconds", "rounds")

    def grid(self) -> Grid:
        given = {
            name: value
            for name, value in asdict(self).items()
            if name not in ("gpu", "precision") and value is not None
        }
        return (cpu_grid if self.gpu == "cpu" else gpu_grid)(**given)


def check_precision(gpu: str, precision: str | None) -> None:
    """Raise UserError for a precision that has no runtime there; None is the usual one."""
    if precision not in (None, *(("float32",) if gpu == "cpu" else ("bf16", "fp8"))):
        raise UserError(
            f"precision {precision} cannot be profiled on {gpu}: float32 can on a CPU, bf16 and fp8 on a GPU"
        )


def count_points(subject: Subject, grid: Grid) -> int:
    """How many points `profile` measures, each `grid.rounds` times."""
    return sum(len(target.points) for target in targets(subject.structure, subject.offered, grid))


def profile(
    subject: Subject,
    *,
    gpu: str,
    out: Path,
    grid: Grid | None = None,
    precision: str | None = None,
    device: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write out/NAME.csv and NAME.json (conditions and drift). Returns its path and the latter.

    gpu: "cpu", or the name of this machine's GPU. precision: of weights and caches, bf16 or fp8 on a GPU, where the files of
    fp8 are called NAME-fp8; float32 on a CPU. device: where to run, to rehearse a GPU's profile on a CPU.
    Raises UserError when `gpu` is not this machine's: a cost is measured where it will be paid.
    """
    grid, structure = grid or ProfileOptions(gpu=gpu).grid(), subject.structure.timed()
    where = torch.device(device or ("cpu" if gpu == "cpu" else "cuda"))
    if where.type == "cuda":
        check_gpu(gpu)
    if gpu == "cpu" and grid.capacity - 1 > structure.max_length:
        raise UserError(f"`contexts` up to {grid.capacity - 1} exceed the parent's context of {structure.max_length}")
    check_precision(gpu, precision)
    fp8 = precision == "fp8"
    stem = f"{subject.name}-fp8" if fp8 else subject.name
    path, partial = out / f"{stem}.csv", out / f"{stem}.partial.csv"
    check_writable(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    timer: Timer = CpuTimer(structure, grid) if gpu == "cpu" else GpuTimer(structure, grid, where, fp8)
    done = _read_done(partial, timer.facts)
    every = targets(structure, subject.offered, grid)
    begin, measured, conditions = time.perf_counter(), 0, [_conditions(where)]
    drift: list[float] = []
    with progress("profile", grid.rounds * sum(len(t.points) for t in every)) as bar, torch.inference_mode():
        for number in range(grid.rounds):
            if drift and max(drift) <= STEADY * min(drift):
                break
            for target in every:
                left = [at for at in target.points if done[target.key, at] <= number]
                bar.advance(len(target.points) - len(left))
                if not left:
                    continue
                bar.note(target.key)
                fits = timer.load(target)
                for at in left:
                    point = timer.time(at) if fits else None
                    append_costs(partial, _row(timer.facts, target.key, at, point))
                    measured += 1
                    bar.advance(1)
                drift.append(timer.reference())
    seconds = time.perf_counter() - begin
    asked = {(target.key, at) for target in every for at in target.points}
    # Other: of an interrupted run with another grid.
    taken, other = list[CostRow](), list[CostRow]()
    for row in _read_rows(partial):
        (taken if _place(row) in asked else other).append(row)
    rows = _medians(taken)
    write_costs(path, rows)
    if other:
        write_costs(partial, other)
    else:
        partial.unlink()
    conditions.append(_conditions(where))
    facts = {
        **timer.facts,
        "shapes": subject.name,
        "points": len(rows),
        "measured_now": measured,
        "seconds": round(seconds, 1),
        "points_per_minute": round(60 * measured / seconds, 1),
        "reference_seconds": drift,
        "conditions": [c for c in conditions if c],
    }
    write_json(path.with_suffix(".json"), facts)
    return path, facts


def _row(facts: Mapping[str, str], part: str, at: At, point: tuple[Timing, int] | None) -> CostRow:
    """point None: it did not fit in memory, which a row without samples says."""
    timing, workspace = point or (Timing(p20=0.0, p50=0.0, p80=0.0, num_samples=0), 0)
    measured = {"p20_s": timing.p20, "p50_s": timing.p50, "p80_s": timing.p80, "num_samples": timing.num_samples}
    known: dict[str, Any] = {**facts, **at._asdict(), **measured}
    return CostRow(part=part, workspace_bytes=workspace, **known)


def _medians(rows: Iterable[CostRow]) -> list[CostRow]:
    """One row a point: the medians over the rounds."""
    found: dict[tuple[str, At], list[CostRow]] = {}
    for row in rows:
        found.setdefault((row.part, At(row.phase, row.batch, row.context)), []).append(row)
    return [_median(same) for _, same in sorted(found.items())]


def _median(same: list[CostRow]) -> CostRow:
    times = {name: median(getattr(row, name) for row in same) for name in ("p20_s", "p50_s", "p80_s")}
    return replace(same[0], num_samples=sum(row.num_samples for row in same), **times)


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


def _read_done(partial: Path, facts: Mapping[str, str]) -> Counter[tuple[str, At]]:
    """How often each point was measured in an interrupted run on the same device."""
    if not partial.is_file():
        return Counter()
    rows = [r for r in _read_rows(partial) if r.device == facts["device"] and r.precision == facts["precision"]]
    write_costs(partial, rows)
    return Counter(map(_place, rows))


def _place(row: CostRow) -> tuple[str, At]:
    """Which point of which part it is."""
    return row.part, At(row.phase, row.batch, row.context)
