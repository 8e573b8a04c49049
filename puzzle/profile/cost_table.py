"""Cost tables: measured seconds of every sub-block, and the time of a workload made of them. Needs no torch.

costs/<gpu>/<name>.csv, one row per (part, precision, phase, batch, context). A part is a sub-block by its key, "embedding h… v…",
"head h… v…", or "model parent". `solve` reads the library's own tables first, then those that ship with the package.
"""

from __future__ import annotations

import csv
import io
import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from puzzle.base.errors import UserError, nearest, writing
from puzzle.base.files import file_hash, write_text
from puzzle.base.workload import PREFILL_ROWS, Workload
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.parents.structure import Layer
from puzzle.profile.parts import WHOLE, Ends, Part, priced_as

PACKAGED = Path(__file__).parent / "costs"


@dataclass(frozen=True, kw_only=True, slots=True)
class CostRow:
    """One measured point. part: a key; precision: of a sub-block's weights and cache (bf16, fp8, float32); p20…p80 in seconds per
    call; workspace_bytes: at the peak of a call, beside weights and caches (0 where nobody counts them: on a CPU)."""

    part: str
    precision: str
    phase: str
    batch: int
    context: int
    p20_s: float
    p50_s: float
    p80_s: float
    num_samples: int
    workspace_bytes: int = 0
    device: str
    versions: str
    date: str


def _text(rows: list[CostRow], header: bool) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(CostRow)], lineterminator="\n")
    if header:
        writer.writeheader()
    for row in rows:
        values = asdict(row)
        writer.writerow(values | {k: f"{values[k]:.6g}" for k in ("p20_s", "p50_s", "p80_s")})
    return text.getvalue()


def write_costs(path: Path, rows: list[CostRow]) -> None:
    write_text(path, _text(rows, header=True))


def append_costs(path: Path, row: CostRow) -> None:
    """Add one row to a table in the making, and make sure that it is on the disk."""
    with writing(path):
        new = not path.exists() or path.stat().st_size == 0
        with open(path, "a", newline="", encoding="utf-8") as handle:
            handle.write(_text([row], header=new))


Key = tuple[str, str, int]  # part, phase, batch


class CostTable:
    """Median seconds by (part, phase, batch, context), linear in context between measured points, in one precision.

    What depends on the number of rows alone is stored by rows: at context 0 in decode, and in prefill at batch 1 with the
    number of prompt tokens as context. In such tables time goes on growing beyond the last measured point as it did between
    the last two, and these points are listed in `extrapolated`; in tables without them (a CPU's) they are errors.
    """

    def __init__(self, path: Path):
        self.path = path
        self.device = ""
        self.precision = ""
        self._points: dict[Key, list[tuple[int, float]]] = {}
        self._workspace: dict[tuple[str, str], dict[int, int]] = {}  # part, phase -> rows: bytes
        self._rows: dict[str, bool] = {}
        self.extrapolated: dict[Key, tuple[int, int, str]] = {}  # asked for at least, at most; what was measured
        try:
            with open(path, newline="", encoding="utf-8") as handle:
                reader = csv.DictReader(handle)
                if reader.fieldnames is not None and "shape" in reader.fieldnames:
                    raise UserError(
                        f"cost table {path} is of an earlier version: profile again, or convert it with "
                        "`python benchmarks/lib/convert_costs.py`"
                    )
                for number, row in enumerate(reader, 2):
                    self._add(row, number)
        except OSError as error:
            raise UserError(f"cost table {path} cannot be read ({error.strerror}): profile again") from error
        if not self._points:
            raise UserError(f"cost table {path} is empty: profile again")
        for points in self._points.values():
            points.sort()
            for at in range(1, len(points)):  # more tokens never take less time: what noise says otherwise is lifted
                points[at] = (points[at][0], max(points[at][1], points[at - 1][1]))
        self.strict = not any(key[1] == "decode" and points[0][0] == 0 for key, points in self._points.items())

    def _add(self, row: dict[str, str], number: int) -> None:
        try:
            seconds = float(row["p50_s"])
            key = (row["part"], row["phase"], int(row["batch"]))
            context = int(row["context"])
            fits = int(row["num_samples"]) > 0
            workspace = int(row.get("workspace_bytes") or 0)
            device, precision = row["device"], row["precision"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"cost table {self.path} line {number} is broken ({error}): profile again") from error
        if not 0 <= seconds < float("inf"):
            raise UserError(f"cost table {self.path} line {number} has p50_s = {row['p50_s']}: profile again")
        if self.precision and precision != self.precision:
            raise UserError(f"cost table {self.path} line {number} is in {precision}, those before in {self.precision}")
        if fits:  # a point without samples did not fit in memory
            self._points.setdefault(key, []).append((context, seconds))
            by_rows = self._workspace.setdefault(key[:2], {})
            num_rows = key[2] * context if key[1] == "prefill" else key[2]
            by_rows[num_rows] = max(by_rows.get(num_rows, 0), workspace)
        self.device, self.precision = device, precision

    @property
    def hash(self) -> str:
        return file_hash(self.path)

    @property
    def batches(self) -> list[int]:
        """Batch sizes that can be served: those whose decode steps were measured."""
        return sorted({key[2] for key in self._points if key[1] == "decode"})

    def has(self, part: Part) -> bool:
        """Whether it was measured."""
        return isinstance(part, NoOp) or any(key[0] == priced_as(part) for key in self._points)

    def parts(self) -> list[str]:
        """The keys of all that was measured."""
        return sorted({key[0] for key in self._points})

    def seconds(self, part: Part, phase: str, batch: int, context: int) -> float:
        """Median seconds of one call. Raises UserError for what was not measured; nothing is guessed."""
        if isinstance(part, NoOp):
            return 0.0
        name = priced_as(part)
        if self._by_rows(name):
            if phase == "prefill":
                if isinstance(part, Ends):
                    return self.seconds(part, "decode", batch, 0)
                known = self._known(name, phase, 1)
                # the runtime takes no more tokens together than were measured
                whole, rest = divmod(batch * context, known[-1][0])
                return whole * known[-1][1] + (self._at(known, rest, (name, phase, batch)) if rest else 0.0)
            return self._known(name, phase, batch)[0][1]
        key = (name, phase, batch)
        if key not in self._points and phase == "prefill":
            return self._prefill(name, batch, context)
        return self._at(self._known(*key), context, key)

    def workspace(self, part: Part, batch: int, input_len: int) -> int:
        """Bytes that one sub-block works with, beside its weights and its cache, at the peak of a prefill or a decode step; 0
        where they were not measured. Between and beyond measured numbers of rows in proportion to the next one."""
        prompts = max(1, PREFILL_ROWS // input_len)  # that go through the runtime together
        found, name = 0.0, priced_as(part)
        for phase, rows in (("prefill", min(batch, prompts) * input_len), ("decode", batch)):
            known = self._workspace.get((name, phase))
            if known:
                at = min((r for r in known if r >= rows), default=max(known))
                found = max(found, known[at] * rows / at)
        return math.ceil(found)

    def _by_rows(self, name: str) -> bool:
        if name not in self._rows:
            found = [points for key, points in self._points.items() if key[:2] == (name, "decode")]
            self._rows[name] = bool(found) and all(c == 0 for points in found for c, _ in points)
        return self._rows[name]

    def _known(self, name: str, phase: str, batch: int) -> list[tuple[int, float]]:
        points = self._points.get((name, phase, batch))
        if points is None:
            raise UserError(
                f"cost table {self.path} has no {phase} time of '{name}' at batch {batch}: profile again with this library"
            )
        return points

    def _prefill(self, name: str, batch: int, context: int) -> float:
        """Attention over more prompts than were measured together: in proportion to the largest batch measured."""
        measured = sorted(key[2] for key in self._points if key[:2] == (name, "prefill"))
        fitting = [b for b in measured if self._points[name, "prefill", b][-1][0] >= context] or measured[:1]
        if not fitting:
            self._known(name, "prefill", batch)
        below = [b for b in fitting if b <= batch]
        nearest_batch = max(below) if below else fitting[0]
        points = self._points[name, "prefill", nearest_batch]
        return self._at(points, context, (name, "prefill", batch)) * batch / nearest_batch

    def _at(self, points: list[tuple[int, float]], context: int, key: Key) -> float:
        """Linear between measured points; marked as extrapolated outside."""
        at = bisect_left(points, (context, -1.0))
        if at < len(points) and points[at][0] == context:
            return points[at][1]
        if self.strict and (at == 0 or at == len(points)):
            name, phase, batch = key
            raise UserError(
                f"cost table {self.path} covers contexts {points[0][0]}-{points[-1][0]} in {phase} of '{name}', "
                f"batch {batch}, context {context}: profile again, with `puzzle profile … --contexts` that span it"
            )
        if at in (0, len(points)):
            least, most, _ = self.extrapolated.get(key, (context, context, ""))
            measured = f"{points[0][0]}" if len(points) == 1 else f"{points[0][0]} to {points[-1][0]}"
            self.extrapolated[key] = min(least, context), max(most, context), measured
        if at == 0:
            return points[0][1]
        if at == len(points):
            if len(points) == 1:
                return points[0][1] * context / points[0][0]
            at -= 1
        (left, low), (right, high) = points[at - 1], points[at]
        return low + (high - low) * (context - left) / (right - left)

    def whole_over_parts(self, parent: Sequence[Part], phase: str, batch: int, context: int) -> float:
        """Measured whole parent over the sum of its parts, at the measured point nearest to `context`; 1 when the
        table has no whole. Children are predicted as this factor times the sum of their parts: it carries what
        no part shows alone (cold instruction caches, dispatch between parts).
        """
        points = self._points.get((WHOLE.key(), phase, batch))
        if not points:
            return 1.0
        at, seconds = min(points, key=lambda p: abs(p[0] - context))
        return seconds / sum(self.seconds(part, phase, batch, at) for part in parent)

    def decode_seconds(self, part: Part, batch: int, work: Workload) -> float:
        """All decode steps of a batch: the prompt gives the first token, output_len - 1 steps the rest."""
        first = work.input_len
        return sum(self.seconds(part, "decode", batch, first + step) for step in range(work.output_len - 1))

    def lowered(self, layer: Layer, first: bool) -> list[SubBlock]:
        """What runs of a layer: in our own runtime the sub-blocks as they are."""
        return list(layer.values())


def around(batches: Sequence[int], batch: int) -> tuple[int, int]:
    """The measured batches next to this one, between which times are linear: twice itself where it was measured. batches: rising.
    Raises UserError beyond them."""
    if not batches[0] <= batch <= batches[-1]:
        raise UserError(
            f"a batch of {batch} lies outside the costs, which cover {batches[0]} to {batches[-1]} sequences: "
            "profile it, or ask for less"
        )
    at = bisect_left(batches, batch)
    return (batch, batch) if batches[at] == batch else (batches[at - 1], batches[at])


def find_costs(gpu: str, name: str | None, roots: list[Path], needs: Collection[Part] = ()) -> CostTable:
    """The table costs/<gpu>/<name>.csv under the first root that has one. roots: the library's costs/, then ours.

    gpu: a folder's name, or its first part ("h200" finds h200-sxm-141gb). needs: what will be asked for; without
    a name, of several tables the one that holds them all counts, and not one in fp8, which asks to be named. Raises
    UserError for an unknown GPU (listing the known ones), or several tables and no name that decides.
    """
    folders = [d for root in roots if root.is_dir() for d in sorted(root.iterdir()) if d.is_dir()]
    others: list[str] = []
    for folder in folders:
        if folder.name != gpu and not folder.name.startswith(f"{gpu}-"):
            continue
        whole = [t for t in sorted(folder.glob("*.csv")) if not t.stem.endswith(".partial")]
        tables = [t for t in whole if name in (None, t.stem)]
        if len(tables) > 1 and needs:
            opened = [(t, CostTable(t)) for t in tables if not t.stem.endswith("-fp8")]
            holding = [t for t, table in opened if all(table.has(part) for part in needs)]
            if not holding:
                raise UserError(
                    f"none of the cost tables for `gpu` {gpu} ({', '.join(t.stem for t in tables)}) holds this library's "
                    f"sub-blocks: run `puzzle profile LIBRARY --gpu {gpu}` on that machine"
                )
            tables = holding
        if len(tables) > 1:
            names = ", ".join(t.stem for t in tables)
            raise UserError(f"several cost tables for `gpu` {gpu}: {names}; pass `shapes` with one of them")
        if tables:
            return CostTable(tables[0])
        others += [t.stem for t in whole]
    if name is not None and others:
        raise UserError(f"`shapes` {name}: the cost tables for `gpu` {gpu} are {', '.join(others)}")
    known = sorted({d.name for d in folders})
    hint = nearest(gpu, known) if known else "none has been profiled yet"
    raise UserError(f"no cost table for `gpu` {gpu} ({hint}): run `puzzle profile LIBRARY --gpu {gpu}` on that machine")
