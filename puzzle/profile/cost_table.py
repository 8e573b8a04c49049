"""Cost tables: measured seconds of every sub-block, and the time of a workload made of them. Needs no torch.

costs/<gpu>/<name>.csv, one row per (part, precision, phase, batch, context). A part is a sub-block by its key, "embedding h… v…",
"head h… v…", "model parent", or "model parent first N". `solve` reads the library's own tables first, then those that ship with
the package.
"""

from __future__ import annotations

import csv
import io
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from puzzle.base.errors import UserError, nearest, writing
from puzzle.base.files import file_hash, write_text
from puzzle.base.units import PRECISION_BYTES
from puzzle.base.workload import PAGE, PREFILL_ROWS, Workload
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import State, SubBlock
from puzzle.parents.structure import Layer, Structure
from puzzle.profile.all_reduce import FOLDER
from puzzle.profile.parts import Ends, Part, Whole, ends_of, priced_as

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
        self._whole: Whole | None = None  # the deepest that was measured
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
        impossible = {
            "p50_s": not (0 < seconds < math.inf or (seconds == 0 and not fits)),
            "phase": key[1] not in ("prefill", "decode"),
            "batch": key[2] < 1,
            "context": context < (key[1] == "prefill"),
            "workspace_bytes": workspace < 0,
            "precision": precision not in PRECISION_BYTES,
        }
        if told := next((name for name, wrong in impossible.items() if wrong), None):
            raise UserError(f"cost table {self.path} line {number} has {told} = {row[told]}: profile again")
        if self.precision and precision != self.precision:
            raise UserError(f"cost table {self.path} line {number} is in {precision}, those before in {self.precision}")
        if (whole := Whole.parse(key[0])) is not None:
            self._whole = max(self._whole or whole, whole, key=lambda one: one.num_layers or math.inf)
        if fits:  # a point without samples did not fit in memory
            self._points.setdefault(key, []).append((context, seconds))
            by_rows = self._workspace.setdefault(key[:2], {})
            num_rows = key[2] * context if key[1] == "prefill" else key[2]
            by_rows[num_rows] = max(by_rows.get(num_rows, 0), workspace)
        self.device, self.precision = device, precision

    @property
    def page(self) -> int:
        """Tokens of a page of the caches where it was measured: the plain runtime, in float32, has none."""
        return 1 if self.precision == "float32" else PAGE

    def kept(self, state: State, num_tokens: int) -> int:
        """Tokens of a sequence that the cache has room for."""
        return state.kept(num_tokens, self.page)

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
                    return self._ends(name, batch)
                return self._grouped(self._prefill_by_rows, name, batch, context)
            return self._known(name, phase, batch)[0][1]
        if phase == "prefill" and not self.strict:
            return self._grouped(self._prefill, name, batch, context)
        key = (name, phase, batch)
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

    def _ends(self, name: str, batch: int) -> float:
        """Of as many prompts as go through together, which need be no batch that was measured: linear between these, beyond them as between
        the last two, and never less than the last, and of fewer as of the fewest."""
        known = [(b, self._points[key][0][1]) for b in self.batches if (key := (name, "decode", b)) in self._points]
        at = min(bisect_left(known, (batch, -1.0)), len(known) - 1)
        if at == 0:
            return known[0][1]
        (left, low), (right, high) = known[at - 1], known[at]
        found = low + (high - low) * (batch - left) / (right - left)
        return max(high, found) if batch > right else found

    def _grouped(self, one: Callable[[str, int, int], float], name: str, batch: int, context: int) -> float:
        """Seconds of a prefill whose prompts go through in groups, as the runtime on a GPU takes them. one: of one group."""
        together = max(1, PREFILL_ROWS // context)
        groups, rest = divmod(batch, together)
        return groups * one(name, together, context) + (one(name, rest, context) if rest else 0.0)

    def _prefill_by_rows(self, name: str, batch: int, context: int) -> float:
        """A group of more rows than were measured counts as several."""
        known = self._known(name, "prefill", 1)
        whole, rest = divmod(batch * context, known[-1][0])
        return whole * known[-1][1] + (self._at(known, rest, (name, "prefill", batch)) if rest else 0.0)

    def _prefill(self, name: str, batch: int, context: int) -> float:
        """Attention of one group: linear between measured numbers of prompts, in proportion beyond them."""
        measured = sorted(key[2] for key in self._points if key[:2] == (name, "prefill"))
        fitting = [b for b in measured if self._points[name, "prefill", b][-1][0] >= context] or measured[:1]
        if not fitting:
            self._known(name, "prefill", batch)
        low, high = around(fitting, min(max(batch, fitting[0]), fitting[-1]))
        less, more = (self._at(self._points[name, "prefill", b], context, (name, "prefill", b)) for b in (low, high))
        if low == high:
            return less * batch / low
        return less + (more - less) * (batch - low) / (high - low)

    def _at(self, points: list[tuple[int, float]], context: int, key: Key) -> float:
        """Linear between measured points; marked as extrapolated outside."""
        at = bisect_left(points, (context, -1.0))
        if at < len(points) and points[at][0] == context:
            return points[at][1]
        if self.strict and (at == 0 or at == len(points)):
            name, phase, batch = key
            option, what = ("prefill", "prompts") if phase == "prefill" else ("contexts", "contexts")
            raise UserError(
                f"cost table {self.path} has {what} of {points[0][0]} to {points[-1][0]} tokens of '{name}', batch {batch}, and {context} "
                f"are asked for: profile again, with `puzzle profile … --{option}` on both sides of that"
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

    def whole_over_parts(self, parent: Structure, phase: str, batch: int, context: int) -> float:
        """Measured whole parent (or its first layers) over the sum of its parts, at the point nearest to `batch` sequences of
        `context`; 1 when the table has no whole, and for decode steps on a GPU (`between_parts`). Children are predicted as
        this factor times the sum of their parts: it carries what no part shows alone (on a CPU cold instruction caches and dispatch
        between parts; on a GPU the clocks of sustained work, parts being timed in bursts). Half of the layers or fewer show that some work
        is slower than in bursts, and never that all layers are faster: a factor below 1 of these counts as 1.
        """
        if phase == "decode" and not self.strict:
            return 1.0
        if not self.strict:
            batch = min(batch, max(1, PREFILL_ROWS // context))  # that go through together
        found = self._whole_and_parts(parent, phase, batch, context)
        factor = found[0] / found[1] if found else 1.0
        return factor if self._tells_of(parent) else max(1.0, factor)

    def between_parts(self, parent: Structure, batch: int) -> float:
        """Seconds that a decode step on a GPU takes longer than its parts, for each sub-block that does something: what lies
        between two of them. Measured on small models it is the same 2 µs whatever the sub-blocks; below 0 where chains of parts were
        measured too long. 0 where no whole was measured, or no more than half of the parent's layers, which tell nothing of all of them
        (docs/lessons.md); and on a CPU (`whole_over_parts`)."""
        if self.strict or not self._tells_of(parent):
            return 0.0
        found = self._whole_and_parts(parent, "decode", batch, 1)
        return (found[0] - found[1]) / found[2] if found else 0.0

    def _tells_of(self, parent: Structure) -> bool:
        """Whether what was measured as a whole is most of the parent."""
        return self._whole is not None and self._whole.tells_of(parent.num_layers)

    def host_seconds(self, batch: int) -> float:
        """0: what our runtime's Python takes is in what was measured."""
        return 0.0

    def _whole_and_parts(
        self, parent: Structure, phase: str, batch: int, context: int
    ) -> tuple[float, float, int] | None:
        """Seconds of the whole and of its parts together, and how many sub-blocks these are. None: not measured."""
        if self._whole is None:
            return None
        key = self._whole.key(), phase
        known = [(k[2], at, s) for k, points in self._points.items() if k[:2] == key for at, s in points]
        if phase == "decode":
            known = [point for point in known if point[0] == batch]
        if not known:
            return None
        size, at, seconds = min(
            known, key=lambda p: (abs(math.log(p[0] * p[1] / (batch * context))), abs(p[1] - context))
        )
        layers = [list(layer.values()) for layer in parent.layers[: self._whole.num_layers]]
        parts: list[Part] = [part for layer in layers for part in layer if not isinstance(part, NoOp)]
        return seconds, sum(self.seconds(p, phase, size, at) for p in (*parts, *ends_of(parent))), len(parts)

    def empty_seconds(self, part: Part, batch: int) -> float:
        """Of a decode step with nothing cached yet: on the line through the two shortest measured contexts."""
        (context, seconds), *later = self._known(priced_as(part), "decode", batch)
        slope = (later[0][1] - seconds) / (later[0][0] - context) if later else 0.0
        return max(0.0, seconds - slope * context)

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


def find_costs(gpu: str, name: str | None, roots: list[Path], needs: Collection[Part] = (), tp: int = 1) -> CostTable:
    """The table costs/<gpu>/<name>.csv under the first root that has one. roots: the library's costs/, then ours.

    gpu: a folder's name, or its first part ("h200" finds h200-sxm-141gb). needs: what will be asked for; without
    a name, of several tables the one that holds them all counts, and not one in fp8, which asks to be named. tp: ranks that
    `needs` are the shares of, for messages. Raises
    UserError for an unknown GPU (listing the known ones), or several tables and no name that decides.
    """
    inside = [d for root in roots if root.is_dir() for d in sorted(root.iterdir()) if d.is_dir()]
    folders = [d for d in inside if d.name != FOLDER]
    others: list[str] = []
    flag, told = (f" --tp {tp}", f" as {tp} GPUs share them") if tp > 1 else ("", "")
    for folder in folders:
        if folder.name != gpu and not folder.name.startswith(f"{gpu}-"):
            continue
        whole = [t for t in sorted(folder.glob("*.csv")) if not t.stem.endswith(".partial")]
        tables = [t for t in whole if name in (None, t.stem)]
        if name is None:  # tables of shares are for those who run these
            tables = [t for t in tables if "-tp" not in t.stem or all(CostTable(t).has(part) for part in needs)]
        if len(tables) > 1 and needs:
            opened = [(t, CostTable(t)) for t in tables if not t.stem.endswith("-fp8")]
            holding = [t for t, table in opened if all(table.has(part) for part in needs)]
            if not holding:
                raise UserError(
                    f"none of the cost tables for `gpu` {gpu} ({', '.join(t.stem for t in tables)}) holds this library's "
                    f"sub-blocks{told}: run `puzzle profile LIBRARY --gpu {gpu}{flag}` on that machine"
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
    raise UserError(
        f"no cost table for `gpu` {gpu} ({hint}): run `puzzle profile LIBRARY --gpu {gpu}{flag}` on that machine"
    )
