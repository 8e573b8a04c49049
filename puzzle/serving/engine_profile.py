"""`puzzle profile --engine vllm --gpu h100 --run`: measure a handful of architectures of a parent's shapes in the vLLM that is installed.

Each runs with random weights in a process of its own (`engine_run.py`). Rows go to FOLDER/measured.csv as they come, so that a killed
call goes on where it was; then `engine_fit` fits, and what is slower than the fit is measured again: the fastest counts. Which architectures: those that tell the constants apart. The parent; half of every
FFN; attention left out in three layers of eight; the fewest KV heads; a mixture of the alternatives, layer by layer; and the first
two layers alone, where the device has so little to do that the engine's own Python shows.
"""

from __future__ import annotations

import csv
import datetime
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click

from puzzle.base.console import say
from puzzle.base.errors import UserError, writing
from puzzle.base.files import write_json, write_text
from puzzle.base.lock import holding
from puzzle.base.machine import cpu_name, gpu_facts
from puzzle.base.units import FIXED_BYTES, PRECISION_BYTES, check_positive
from puzzle.base.workload import Workload
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.variant import variant_of
from puzzle.parents.structure import Layer, Structure
from puzzle.profile.engine import Constants, EngineModel, read_architectures
from puzzle.profile.engine_fit import HICCUP, compared, fit, fit_engine, read_measurements
from puzzle.profile.parts import Head, ends_of, priced_as
from puzzle.serving.check import EngineFailed
from puzzle.serving.engine_run import ENGINE, Engine, Point, check_engine, measured_random

GRIDS = {"cpu": ((1, 4, 16), (32, 96), 24), "": ((1, 16, 64, 128, 256), (128, 1024, 2048), 64)}  # by `gpu`
TOKENS = 2**16  # of a longer prompt's batch together
AGAIN = {
    "cpu": 0,
    "": 2,
}  # times at most, by `gpu`, that a point is measured once more: a CPU's figures are a rehearsal
WEIGHTS = 0.3  # of a GPU's memory that the measured layers may fill; a larger parent is measured on its first layers
COLUMNS = (
    "architecture", "num_seqs", "input_len", "output_len", "decode_step_ms", "prefill_ms", "output_tokens_per_s", "weight_bytes",
    "cache_bytes", "cached_tokens", "used_bytes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineGrid:
    """batches: at the shortest prompt. contexts: prompt lengths, the longer ones at the largest batch of at most TOKENS tokens.
    output_len: of every request. None: what is usual for the machine."""

    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] | None = None
    output_len: int | None = None

    def points(self, gpu: str, max_length: int) -> list[Point]:
        """Raises UserError for lengths that leave nothing to measure."""
        check_positive(self, "batches", "contexts", "output_len")
        usual = GRIDS.get(gpu, GRIDS[""])
        batches, contexts = self.batches or usual[0], self.contexts or usual[1]
        num_tokens = self.output_len or usual[2]
        longest = max_length - num_tokens
        if longest < 1:
            raise UserError(f"{num_tokens} tokens of a request do not fit the parent's context of {max_length}")
        lengths = sorted({min(c, longest) for c in contexts})
        found = [(b, lengths[0]) for b in sorted(set(batches))]
        for length in lengths[1:]:
            found.append((max([b for b in batches if b * length <= TOKENS] or [min(batches)]), length))
        return [
            Point(batch=b, work=Workload(input_len=length, output_len=num_tokens)) for b, length in dict.fromkeys(found)
        ]


def architectures(structure: Structure) -> dict[str, Structure]:
    """What is measured, by name."""

    def some(slot: str, *names: str, every: Sequence[int] = (0,), of: int = 1) -> list[Layer]:
        """In layers i where i mod `of` is in `every`, the first of `names` that the slot's sub-block can take."""
        return [
            {**layer, slot: _variant(layer[slot], names)} if i % of in every and slot in layer else layer
            for i, layer in enumerate(structure.layers)
        ]

    narrow, few = some("ffn", "0.5"), some("attention", "kv1", "kv2", "kv4")
    without = some("attention", "none", every=(2, 5, 7), of=8)
    mixed = [(structure.layers, few, without, narrow)[i % 4][i] for i in range(structure.num_layers)]
    found: dict[str, Sequence[Layer]] = {
        "parent": structure.layers, "ffn_half": narrow, "attention_none": without, "kv_heads_fewest": few, "mixed": mixed,
        "first_layers": structure.layers[:2],
    }  # fmt: skip
    made: dict[str, Structure] = {}
    for name, layers in found.items():
        one = structure.with_layers(layers)
        if one.layers not in [other.layers for other in made.values()]:
            made[name] = one
    return made


def _variant(own: SubBlock, names: Iterable[str]) -> SubBlock:
    """`own` where none of the names fits it."""
    for name in names:
        try:
            return NO_OP if name == "none" else variant_of(own, name).sub_block
        except UserError:
            continue
    return own


def fitting(structure: Structure, how: Engine) -> Structure:
    """The parent, or as many of its first layers as leave room on the card: what is fitted is of a sub-block."""
    room = WEIGHTS * gpu_facts(how.gpu).memory_bytes - FIXED_BYTES[how.precision] * structure.num_fixed_parameters
    count = 0
    for layer in structure.layers:
        room -= PRECISION_BYTES[how.precision] * sum(sub_block.num_parameters for sub_block in layer.values())
        if room < 0 and count >= 8:
            break
        count += 1
    return structure.with_layers(structure.layers[:count])


def described(structure: Structure, how: Engine) -> dict[str, Any]:
    """An entry of architectures.json: what runs, after the export's rewriting where the reader needs one."""
    runs = [b for layer in structure.layers for b in layer.values() if not isinstance(b, NoOp)]
    if how.reader != "hf":
        model = EngineModel(ENGINE, how.gpu, Constants(), parent=(structure, structure.usual), windows=True)
        runs = [b for i, layer in enumerate(structure.layers) for b in model.lowered(layer, first=i == 0)]
    (head,) = (end for end in ends_of(structure) if isinstance(end, Head))
    return {"sub_blocks": dict(Counter(priced_as(b.timed()) for b in runs)), "head": head.key()}


def profile_engine(
    engine: str, structure: Structure, how: Engine, folder: Path, grid: EngineGrid | None = None
) -> dict[str, Any]:
    """Measure what FOLDER/measured.csv lacks, fit, and return what `fit_engine` does.

    Raises UserError as `engine_run.measured` does, for a folder with figures from elsewhere, and where an architecture failed.
    """
    check_engine(engine)
    points = (grid or EngineGrid()).points(how.gpu, structure.max_length)
    with holding(folder):
        return _profile(engine, structure, how, folder, points)


def _profile(engine: str, structure: Structure, how: Engine, folder: Path, points: list[Point]) -> dict[str, Any]:
    table, facts_path = folder / "measured.csv", folder / "architectures.json"
    rows = _read_rows(table)
    asked = {name: (one, described(one, how)) for name, one in architectures(fitting(structure, how)).items()}
    own = {"gpu": how.gpu, "precision": how.precision, "format": how.reader}
    for name in dict.fromkeys(r["architecture"] for r in rows):
        kept = read_architectures(facts_path)
        _check_kept(folder, kept, own, name, kept["architectures"].get(name), asked.get(name, (None, None))[1])
    found = _Found(structure.usual, how, asked, own, table, facts_path, rows)
    failed = found.measure({name: [p for p in points if not found.has(name, p)] for name in asked})
    if failed:
        first = next(iter(failed))
        raise UserError(
            f"{len(failed)} of the architectures failed in vLLM ({first}: {failed[first]}); what was measured is in {table}: mend the "
            f"cause and run the same command again, or fit what there is with `puzzle profile --engine {engine} --gpu {how.gpu} --fit {table}`"
        )
    if how.gpu != "cpu":
        room = [int(r["weight_bytes"]) + int(r["cache_bytes"]) for r in found.rows]
        write_json(facts_path, read_architectures(facts_path) | {"room_bytes": int(median(room))})
    for _ in range(AGAIN.get(how.gpu, AGAIN[""])):
        slow = {name: of for name, of in _held_up(engine, table, points).items() if name in asked}
        if not slow:
            break
        told = ", ".join(f"{name} ({len(of)})" for name, of in slow.items())
        say(f"slower than the fit by more than {100 * HICCUP:.0f} %, measured again: {told}")
        found.measure(slow)
    return fit_engine(engine, table, gpu=how.gpu)


@dataclass(slots=True)
class _Found:
    """What is measured, row by row, into `table`. asked: structures with their entries of architectures.json, by name."""

    base: Layer
    how: Engine
    asked: dict[str, tuple[Structure, dict[str, Any]]]
    own: dict[str, str]
    table: Path
    facts: Path
    rows: list[dict[str, str]]

    def has(self, name: str, point: Point) -> bool:
        wanted = {"architecture": name} | {key: str(value) for key, value in point.to_json().items()}
        return any(all(row[key] == value for key, value in wanted.items()) for row in self.rows)

    def measure(self, points: dict[str, list[Point]]) -> dict[str, str]:
        """What vLLM said of the architectures that failed in it, by name."""
        failed = {}
        for name, these in points.items():
            try:
                if these:
                    self._measure(name, these)
            except EngineFailed as error:
                failed[name] = str(error)
                say(f"{name}: {error}")
        return failed

    def _measure(self, name: str, points: list[Point]) -> None:
        (one, entry), facts = self.asked[name], {}
        for line in measured_random(one, self.base, points, self.how):
            if "engine" in line:
                facts = line["engine"]
                _describe(self.facts, facts, self.own, name, entry)
                click.echo(f"{name}: started in {line['start_seconds']:g} s", err=True)
                continue
            self.rows.append(_row(name, line, facts))
            _append(self.table, self.rows[-1])
            click.echo(f"{name}: {_told(self.rows[-1], line['measured'])}", err=True)


def _held_up(engine: str, table: Path, points: list[Point]) -> dict[str, list[Point]]:
    """By architecture, the points whose step or prompts took longer than the fit to all of them says, by more than HICCUP: something
    else may have run beside them."""
    told = read_architectures(table.with_name("architectures.json"))
    measured = [m for m in read_measurements(table, list(told["architectures"])) if m.what != "throughput"]
    slow: dict[str, list[Point]] = {}
    for row in compared(fit(engine, told, measured), told, measured):
        if row["measured"] > row["predicted"] * (1 + HICCUP):
            at = {name: row[name] for name in ("num_seqs", "input_len", "output_len")}
            slow.setdefault(row["architecture"], []).extend(p for p in points if p.to_json() == at)
    return {name: list(dict.fromkeys(of)) for name, of in slow.items() if of}


def _describe(path: Path, facts: dict[str, Any], own: dict[str, str], name: str, entry: dict[str, Any]) -> None:
    """Add an architecture to architectures.json. Raises UserError where it tells of another engine, GPU or precision."""
    device = cpu_name() if own["gpu"] == "cpu" else facts["device"]
    told = own | {"device": device, "versions": facts["versions"]}
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "architectures": {}}
    found |= read_architectures(path) if path.is_file() else {}
    known = found["architectures"]
    _check_kept(path.parent, found, told, name, known.get(name, entry), entry)
    write_json(path, found | told | {"architectures": known | {name: entry}})


def _check_kept(folder: Path, found: dict[str, Any], told: dict[str, str], name: str, known: Any, entry: Any) -> None:
    """Raise UserError where the figures in `folder` are not those of `told`, or of the architecture that `entry` is."""
    for key, value in told.items():
        if found.get(key, value) != value:
            raise UserError(
                f"{folder} holds figures of {key} '{found[key]}', and this is '{value}': give another `out`"
            )
    if known is None or known != entry:
        raise UserError(f"{folder} holds figures of another parent's '{name}': give another `out`")


def _row(name: str, line: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    """Of the CSV; without times for a point that the cache has no room for."""
    point, found = line["point"], line["measured"]
    row = dict.fromkeys(COLUMNS, "") | {"architecture": name, **{k: str(v) for k, v in point.items()}}
    if "step" in found:
        row |= {
            "decode_step_ms": f"{1e3 * found['step']:.4f}",
            "prefill_ms": f"{1e3 * found['prefill']:.3f}",
            "output_tokens_per_s": f"{point['num_seqs'] * point['output_len'] / found['whole']:.2f}",
        }
    return row | {
        k: "" if facts[k] is None else str(facts[k])
        for k in ("weight_bytes", "cache_bytes", "cached_tokens", "used_bytes")
    }


def _told(row: dict[str, str], found: dict[str, Any]) -> str:
    at = f"{row['num_seqs']} x {row['input_len']}/{row['output_len']}"
    if "skipped" in found:
        return f"{at} left out: {found['skipped']}"
    return (
        f"{at}: prefill {row['prefill_ms']} ms, step {row['decode_step_ms']} ms, {row['output_tokens_per_s']} tokens/s"
    )


def _read_rows(path: Path) -> list[dict[str, str]]:
    """A last half-written line is cut off. Raises UserError for a file that nothing here wrote."""
    if not path.is_file():
        return []
    text = path.read_bytes().decode(errors="replace")
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.DictReader(whole.splitlines()))
    if any(list(row) != list(COLUMNS) or None in row.values() for row in rows):
        raise UserError(f"{path} is not what this command writes: move it away, or give another `out`")
    if whole != text:
        write_text(path, whole)
    return rows


def _append(path: Path, row: dict[str, str]) -> None:
    with writing(path), open(path, "a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        if handle.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
