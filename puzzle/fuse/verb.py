"""What `puzzle fuse` does with its options: which runs, measured on what, written where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle.base.console import say
from puzzle.base.device import pick_device
from puzzle.base.errors import UserError
from puzzle.base.files import check_writable, claim_output, write_json
from puzzle.base.units import check_positive, parse_bytes, parse_count
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child
from puzzle.export.write import Source, open_source
from puzzle.fuse.matrix import Dependency, check_matplotlib, draw_heat_map, read_dependency
from puzzle.fuse.measure import measure_dependency, parallel_report
from puzzle.fuse.rewrite import Norm
from puzzle.fuse.runs import Rule, Run, parse_runs
from puzzle.fuse.stage import describe, fuse_child, open_walker, pick_runs
from puzzle.parents.structure import Structure


@dataclass(frozen=True, kw_only=True, slots=True)
class FuseOptions:
    """runs: by hand ("3-5,8-11"), "solved", "auto", or None: as the child was solved for, else auto. max_width: channels, or "4x" the
    parent's. dependency_file: in place of data. dependency_only: measure, fuse nothing. The rest as `puzzle fuse --help` says."""

    library: Path | None = None
    data: tuple[str, ...] = ()
    out: Path | None = None
    runs: str | None = None
    norm: Norm = "own"
    max_dependency: float = 0.1
    keep_last: bool = True
    max_width: str | None = None
    sequences: int = 16
    seq_len: int = 512
    dependency_file: Path | None = None
    dependency_only: bool = False
    heat_map: Path | None = None
    parallel_blocks: bool = False
    max_shard: str = "4GiB"
    dry_run: bool = False
    force: bool = False
    memory_limit: int | None = None
    text_field: str = "text"
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError for values that no child could be fused with."""
        check_positive(self, "sequences", "seq_len", "max_dependency", "memory_limit")
        parse_bytes(self.max_shard, "max_shard")

    def check_for(self, parent: Structure) -> None:
        """The same for any child of this parent."""
        if self.runs not in (None, "auto", "solved"):
            parse_runs(self.runs, parent.num_layers)
        widths = [b.intermediate_size for _, _, b in parent if isinstance(b, SwiGLU)]
        if self.max_width is not None:
            channels(self.max_width, max(widths, default=1))


def fuse_verb(source: Path, wanted: FuseOptions) -> dict[str, Any]:
    """{"child", "written": [paths], "dependency_only"} and what `stage.describe` gives; "parallel" with --parallel-blocks.

    Everything that can be wrong with the options is said before anything is measured. Raises UserError.
    """
    opened = open_source(source) if wanted.library is None else open_source(wanted.library, source)
    child = opened.child
    if wanted.heat_map is not None:
        check_matplotlib()
        check_writable(wanted.heat_map.parent)
    if wanted.data and wanted.dependency_file is not None:
        raise UserError("`data` and `dependency` both say where the dependency comes from: leave one out")
    if wanted.parallel_blocks and not wanted.data:
        raise UserError("`parallel_blocks` is measured on text: pass `data`")
    if wanted.dependency_only:
        return _dependency_only(source, opened, wanted)
    if wanted.out is None and not wanted.dry_run:
        raise UserError("`out` is missing: say where the fused child goes, or pass `dry_run`")
    if wanted.out is not None and not wanted.dry_run:
        claim_output(wanted.out, wanted.force, [source, wanted.library, *wanted.data])
    max_shard = parse_bytes(wanted.max_shard, "max_shard")
    rule = _rule(child, wanted)
    runs = _given(source, opened, wanted)
    if runs is not None:
        describe(child, runs, wanted.norm, None)  # says what is wrong before anything is measured
    else:
        pick_device(wanted.device)  # that, and whether anything can be fused, is told before anything is measured
        pick_runs(child, Rule(keep_last=rule.keep_last, max_width=rule.max_width), None)
    if runs is None and not wanted.data and wanted.dependency_file is None:
        raise UserError("nothing says which layers to fuse: pass `data` with held-out text, or `runs` 3-5 by hand")
    dependency, report = _measured(opened, wanted)
    written = _drawn(wanted.heat_map, dependency, child.name)
    if runs is None:
        runs = pick_runs(child, rule, dependency)
    if wanted.dry_run or wanted.out is None:
        facts = describe(child, runs, wanted.norm, dependency)
    else:
        facts = fuse_child(
            opened,
            wanted.out,
            runs,
            norm=wanted.norm,
            dependency=dependency,
            report=report,
            force=wanted.force,
            max_shard_bytes=max_shard,
        )
        written.append(str(wanted.out))
    found = {"child": str(source), **facts, "written": written, "dependency_only": False}
    return found | ({} if report is None else {"parallel": report})


def _dependency_only(source: Path, opened: Source, wanted: FuseOptions) -> dict[str, Any]:
    if not wanted.data:
        raise UserError("`dependency_only` is measured on text: pass `data`")
    out = wanted.out
    if out is None or out.suffix != ".json":
        raise UserError(f"`out` {out or 'is missing'}: with `dependency_only` it is a file, such as dependency.json")
    check_writable(out.parent)
    dependency, report = _measured(opened, wanted)
    assert dependency is not None, "there is text"
    write_json(out, dependency.to_json())
    written = [str(out), *_drawn(wanted.heat_map, dependency, Path(source).absolute().name)]
    found = {"child": str(source), "written": written, "dependency_only": True, **dependency.to_json()}
    return found | ({} if report is None else {"parallel": report})


def _rule(child: Child, wanted: FuseOptions) -> Rule:
    width = None if wanted.max_width is None else channels(wanted.max_width, child.ffn.intermediate_size)
    return Rule(max_dependency=wanted.max_dependency, keep_last=wanted.keep_last, max_width=width)


def channels(text: str, own: int) -> int:
    """A `max_width` in channels. own: the parent's. Raises UserError for what is neither a number nor a multiple."""
    times = re.fullmatch(r"\s*([0-9.]+)\s*x\s*", text)
    try:
        return int(float(times[1]) * own) if times else parse_count("max_width", text)
    except ValueError:
        raise UserError(f"`max_width` {text}: write channels such as 28672, or 4x the parent's") from None


def _given(source: Path, opened: Source, wanted: FuseOptions) -> list[Run] | None:
    """Runs by hand or as the child was solved for; None when they are to be chosen by dependency."""
    text = wanted.runs
    if text == "auto":
        return None
    if text is not None and text != "solved":
        return parse_runs(text, len(opened.child.layers))
    solved = opened.solved
    if solved is not None and solved.fuse:
        if text is None:
            listed = ",".join(f"{first}-{last}" for first, last in solved.fuse)
            say(f"runs {listed}, as this child was solved for; --runs auto chooses by dependency instead")
        return list(solved.fuse)
    if text == "solved":
        raise UserError(
            f"`runs` solved: {source} records no runs; run `puzzle solve --fusion` and export again, or leave it out"
        )
    return None


def _measured(opened: Source, wanted: FuseOptions) -> tuple[Dependency | None, dict[str, Any] | None]:
    """The dependency, from text or from a file, and the report on blocks in parallel."""
    if wanted.dependency_file is not None:
        return read_dependency(wanted.dependency_file, len(opened.child.layers)), None
    if not wanted.data:
        return None, None
    walker, facts = open_walker(
        opened.child,
        wanted.data,
        num_sequences=wanted.sequences,
        seq_len=wanted.seq_len,
        text_field=wanted.text_field,
        device=wanted.device,
        memory_limit=wanted.memory_limit,
        ffns=wanted.dependency_only,
    )
    layers, ffns = measure_dependency(walker, ffns=wanted.dependency_only)
    report = parallel_report(walker) if wanted.parallel_blocks else None
    return Dependency(layers=layers, ffns=ffns, facts=facts), report


def _drawn(path: Path | None, dependency: Dependency | None, name: str) -> list[str]:
    """Draw the heat map where it is asked for. Returns what was written."""
    if path is None:
        return []
    matrix = None if dependency is None else dependency.layers or dependency.ffns
    if matrix is None:
        raise UserError("`heat_map` draws the dependency, which was not measured: pass `data`, or `dependency`")
    draw_heat_map(path, matrix, f"dependency between the layers of {name}")
    return [str(path)]
