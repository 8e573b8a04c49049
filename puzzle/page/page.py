"""report.html: all sections, what is missing in the place of each, and the style sheet."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from puzzle import __version__
from puzzle.base.errors import UserError
from puzzle.base.files import read_any, write_text
from puzzle.base.units import seconds_text
from puzzle.page import sections, training
from puzzle.page.found import Found, understood
from puzzle.page.sections import flat, say, table

MOST_BYTES = 2_000_000
STYLE = Path(__file__).with_name("style.css")
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}: puzzle report</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>{style}</style></head>
"""
MARKS = "Predicted figures and marks are hollow (○), measured ones filled (●). Nothing on this page is loaded from elsewhere."


def write_page(root: Path, out: Path | None = None) -> dict[str, Any]:
    """Write the page of a directory, whole or not at all. Returns {"report", "bytes", "found": {kind: files}, "missing": {section:
    the command that makes it}}. Raises UserError for a directory with nothing in it, and for a file that is not understood."""
    run, target = Found(root), out or root / "report.html"
    if target.suffix != ".html" or target.is_dir():
        raise UserError(f"`out` {target}: give the name of a file that ends with .html")
    if run.library and run.solved and run.library.fingerprint != run.solved.parent_fingerprint:
        both = run.files["library"][0], run.files["architecture"][0]
        raise UserError(f"{both[0]} and {both[1]} are of different parents: give a directory with one of them")
    missing, body = {}, ""
    for title, section, command in SECTIONS:
        if not (made := section(run)):
            missing[title] = _command(run, command)
            made = _lacking(missing[title])
        body += f"<section><h2>{title}</h2>{made}</section>"
    name = run.library.name if run.library else root.absolute().name
    lines = [f"{root.absolute().name}, reported by puzzle {__version__} on {datetime.now():%Y-%m-%d %H:%M}", MARKS]
    lines += (
        [f"Further libraries, not shown: {', '.join(map(str, run.files['library'][1:]))}."]
        if len(run.files["library"]) > 1
        else []
    )
    top = HEAD.format(title=escape(name), style=STYLE.read_text(encoding="utf-8"))
    html = f"{top}<body><main><h1>{escape(name)}</h1>{''.join(map(say, lines))}{body}</main></body></html>\n"
    html = html.encode("utf-8", "replace").decode()  # JSON may hold halves of characters
    if (size := len(html.encode())) > MOST_BYTES:
        raise UserError(
            f"the report of {root} would have {size:,} bytes, over {MOST_BYTES:,}: give a directory with less in it"
        )
    write_text(target, html)
    found = {kind: [str(path.relative_to(root)) for path in paths] for kind, paths in run.files.items() if paths}
    return {"report": str(target), "bytes": size, "found": found, "missing": missing}


def _command(run: Found, words: str) -> str:
    """With the paths of what is there, or of where it should be."""
    places = {"root": run.root, "library": run.root / "library", "solution": run.root / "solution"}
    for kind, place in (("library", "library"), ("architecture", "solution")):
        places |= {place: run.files[kind][0].parent} if run.files[kind] else {}
    return words.format(**{name: shlex.quote(str(path)) for name, path in places.items()})


def _lacking(command: str) -> str:
    return f'<p class="missing">Not measured or not there: run <code>{escape(command)}</code></p>'


def _promise(run: Found) -> str:
    made = sections.promise(run)
    lacking = [BENCH] * (not run.files["bench"]) + [EVALUATE] * (not run.files["result"] + run.files["evaluate"])
    return made and made + "".join(_lacking(_command(run, words)) for words in lacking)


def _recipe(run: Found) -> str:
    """What was asked for: of the whole road, of the library, of the solver, of the healing."""
    parts: dict[str, Any] = dict(run.each("recipe", lambda name, value: (name, value)))
    if run.library is not None:
        with understood(run.files["library"][0]):
            parts["the library"] = {name: run.library.facts[name] for name in ("recipe", "seed", "data")}
    if (solved := run.solved) is not None:
        with understood(run.files["architecture"][0]):
            told = f"{solved.solver}: {solved.status}, {solved.certificate}"
        asked = {"goal": solved.goal, "workload": asdict(solved.workload), "GPUs": solved.tp}
        parts["the solution"] = asked | {"solver": told}
    for name, record in _healed(run):
        parts[name] = {key: record[key] for key in ("teacher", "run", "num_tokens", "sources")}
    return "".join(
        f"<details><summary>{escape(name)}</summary>{table(('', ''), [(k, str(v)) for k, v in flat(value).items()], 2)}</details>"
        for name, value in parts.items()
    )


def _healed(run: Found) -> list[tuple[str, dict[str, Any]]]:
    """What was recorded of every healing that has ended, by the name of its file."""
    found = []
    for path in (log.with_name("heal.json") for log in run.files["heal"]):
        if path.is_file():
            with understood(path):
                record = read_any(path, "puzzle heal")
                found.append((str(path.relative_to(run.root)), {key: record[key] for key in HEALED}))
    return found


def _versions(run: Found) -> str:
    """A row a file: what made it, where, and when."""
    rows: list[tuple[Any, ...]] = []
    if run.library is not None:
        rows.append(
            (str(run.files["library"][0].relative_to(run.root)), f"puzzle {run.library.facts.get('puzzle')}", "", "")
        )
        for path in sorted(run.library.root.glob("costs/*/*.csv")):
            with understood(path), open(path, newline="", encoding="utf-8") as handle:
                words = ("versions", "device", "date")
                told = {tuple(str.strip(row[word]) for word in words) for row in csv.DictReader(handle)}
                rows += [(str(path.relative_to(run.root)), *one) for one in sorted(told)]
    for name, solved in run.architectures.items():
        rows.append((name, f"puzzle {solved.puzzle}", f"priced for {solved.costs['device']}", ""))
    for kind in ("result", "evaluate", "bench", "tasks"):
        rows += run.each(
            kind,
            lambda name, value: (
                name,
                value.get("child", {}).get("measured", {}).get("versions"),
                value.get("device"),
                "",
            ),
        )
    rows += [(name, f"puzzle {one['puzzle']}, torch {one['torch']}", one["device"], "") for name, one in _healed(run)]
    changed = [datetime.fromtimestamp((run.root / row[0]).stat().st_mtime) for row in rows]
    dated = [(*row[:3], row[3] or f"file of {when:%Y-%m-%d}") for row, when in zip(rows, changed, strict=True)]
    times = run.each("result", lambda _, v: ", ".join(f"{k} {seconds_text(s)}" for k, s in v["seconds"].items()))
    made = table(("", "versions", "device", "date"), dated, 4) if rows else ""
    return made + "".join(say(f"Time of each stage: {one}.") for one in times)


HEALED = ("teacher", "run", "num_tokens", "sources", "puzzle", "torch", "device")
BUILD = "puzzle build-library PARENT --data TEXT --out {library}"
SOLVE = "puzzle solve {library} --gpu GPU --throughput 2x --out {root}/solution"
PARETO = "puzzle solve {library} --gpu GPU --pareto throughput --points 20 --out {root}/frontier"
BENCH = "puzzle bench {solution} --gpu GPU --with-parent --json > {root}/bench.json"
EVALUATE = "puzzle evaluate PARENT {solution} --data TEXT --json > {root}/evaluate.json"
HEAL = "puzzle heal CHILD --teacher PARENT --data TEXT --out {root}/healed"
TASKS = "puzzle evaluate PARENT CHILD --tasks NAMES --json > {root}/tasks.json"
PROMPT = "puzzle evaluate PARENT CHILD --data TEXT --prompt TEXT --json > {root}/evaluate.json"
SECTIONS: tuple[tuple[str, Callable[[Found], str], str], ...] = (
    ("Architecture", sections.architecture, SOLVE),
    ("Promise and delivery", _promise, SOLVE),
    ("Frontier", sections.frontier, PARETO),
    ("Scores", training.scores, "puzzle score {library} --data TEXT"),
    ("Block-local distillation", training.distillation, BUILD),
    ("Healing", training.healing, HEAL),
    ("Tasks", sections.tasks, TASKS),
    ("Continuations", sections.continuations, PROMPT),
    ("Recipe", _recipe, BUILD),
    ("Versions, devices, dates", _versions, BUILD),
)
