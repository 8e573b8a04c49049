"""Sections of what was chosen, promised, measured and asked: each gives HTML, or "" where nothing is found. All text from files goes
through `table`, `say`, `figure` or a chart, which escape it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from puzzle.base.units import bytes_text, layer_name
from puzzle.choose.frontier import read_frontier
from puzzle.export.picture import LEGEND
from puzzle.page.found import Found
from puzzle.page.svg import Cell, Series, chart, grid, number

PREDICTED, MEASURED = "predicted", "measured"
ON_AXIS = {  # of a frontier: the figure that stands on it, its label, its size
    "throughput": ("tokens_per_second", "tokens/s", 1.0),
    "latency": ("latency_seconds", "latency of a request, s", 1.0),
    "memory": ("memory_bytes", "weights and KV cache, GB", 1e9),
}
FIGURES: tuple[tuple[str, str, Callable[[Any], str], bool], ...] = (  # and whether the parent's stands there too
    ("tokens_per_second", "tokens/s", "{:,.5g}".format, True),
    ("batch", "batch", "{:,}".format, True),
    ("ttft_seconds", "time to first token, s", "{:.4g}".format, False),
    ("tpot_seconds", "time per later token, s", "{:.4g}".format, False),
    ("memory_bytes", "weights and KV cache", bytes_text, True),
    ("kv_bytes_per_token", "KV bytes per token", "{:,}".format, True),
    ("num_parameters", "parameters", "{:,}".format, True),
    ("kl", "KL to the parent (predicted: sum of scores), nats/token", "{:.4f}".format, False),
    ("loss", "held-out loss, nats/token", "{:.4f}".format, True),
    ("top1_agreement", "top-1 agreement", "{:.1%}".format, False),
)
Column = tuple[str, dict[str, Any], dict[str, Any]]  # head, figures of "child", "parent" and "both", what was promised


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """words: how many columns, from the left, hold words and not figures. A head that begins with PREDICTED or MEASURED has its mark."""

    def cell(kind: str, place: int, value: Any) -> str:
        told = escape("" if value is None else value if isinstance(value, str) else number(value))
        first, _, rest = told.partition(" ")
        if kind == "th" and first in (PREDICTED, MEASURED):
            told = f'<span class="{first}">{first}</span> {rest}'
        return f"<{kind}{'' if place < words else ' class=n'}>{told}</{kind}>"

    lines = [("th", columns), *(("td", row) for row in rows)]
    html = "".join(f"<tr>{''.join(cell(k, n, v) for n, v in enumerate(row))}</tr>" for k, row in lines)
    return f'<div class="wide"><table>{html}</table></div>'


def say(words: str, name: str = "") -> str:
    return f'<p class="{name}">{escape(words)}</p>'


def figure(drawn: str, words: str) -> str:
    return f"<figure>{drawn}<figcaption>{escape(words)}</figcaption></figure>"


def architecture(run: Found) -> str:
    """The first architecture drawn, and all of them in a table where there are several."""
    if run.solved is None:
        return ""
    solved, rows = run.solved, []
    for slot in solved.parent.slots:
        cells: list[Cell | None] = []
        for n, (layer, theirs) in enumerate(zip(solved.sub_blocks, solved.parent.layers, strict=True)):
            if slot not in layer:
                cells.append(None)
                continue
            own, whole = layer[slot], theirs[slot]
            told = "as the parent" if own == whole else own.words(whole)
            told += ", fp8" if (n, slot) in solved.fp8_weights else ""
            mark = own.symbol(whole)
            share = min(1.0, own.num_parameters / max(1, whole.num_parameters))
            cells.append(Cell(f"{layer_name(n)} {slot}: {told}", fill=share, mark="" if mark in "█▁▂▃▄▅▆▇" else mark))
        rows.append((slot, cells))
    kept = sum(a == b for a, b in zip(solved.sub_blocks, solved.parent.layers, strict=True))
    words = f"{run.architectures[0][0]}: {len(solved.layers)} layers, {kept} as in the parent. Filled: the share of the parent's parameters. "
    drawn = figure(
        grid("architecture", rows, 34, "layer"),
        words + LEGEND.replace("█ parent   ", "").replace("▁…▇ narrower   ", ""),
    )
    if len(run.architectures) == 1:
        return drawn
    every = [(name, one.speedup, one.objective, one.predicted.batch) for name, one in run.architectures]
    return drawn + table(
        ("", "predicted speed-up", "predicted sum of scores, nats/token", "predicted best batch"), every
    )


def promise(run: Found) -> str:
    """A column a source: the architecture's promise, then all that measured it."""
    columns = [
        *_promised(run),
        *run.each("result", _by_run),
        *run.each("evaluate", _by_evaluate),
        *run.each("bench", _by_bench),
    ]

    def row(label: str, form: Callable[[Any], str], who: str, key: str) -> tuple[str, ...]:
        cells = []
        for _, *both in columns:
            value, held = ((one.get(who) or {}).get(key) for one in both)
            told = "" if value is None else form(value)
            if value is not None and key == "kl" and "kl_stderr" in both[0][who]:
                told += f" ± {both[0][who]['kl_stderr']:.4f}"
            cells.append(told + (f" ({value / held:.3f})" if held and value is not None else ""))
        return label, *cells

    rows = [row("speed-up, each at its best batch", "{:.3g}×".format, "both", "speedup")]
    for key, label, form, twice in FIGURES:
        rows.append(row(label, form, "child", key))
        rows += [row(f"the parent's {label}", form, "parent", key)] * twice
    if not any(cell for _, *cells in rows for cell in cells):
        return ""
    note = "In brackets: measured over predicted, both for one machine. The predicted KL is the sum of the replaced blocks' own scores; "
    healed = " That of run is the child's after healing, the promise is for the child before." * bool(run.files["heal"])
    shown = [one for one in rows if any(one[1:])]
    return table(("", *(head for head, _, _ in columns)), shown) + say(
        f"{note}the whole child's KL is what is measured.{healed}"
    )


def _promised(run: Found) -> Iterator[Column]:
    if (solved := run.solved) is None:
        return
    child, parent = asdict(solved.predicted) | {"kl": solved.objective}, asdict(solved.parent_predicted)
    head = f"for {solved.costs['device']}, {solved.precision}, {_work(asdict(solved.workload))}"
    yield f"{PREDICTED} {head}", {"child": child, "parent": parent, "both": {"speedup": solved.speedup}}, {}
    if solved.measured is not None:
        yield (
            f"{MEASURED} where it was chosen, {solved.measured['num_tokens']:,} tokens",
            {"child": dict(solved.measured)},
            {},
        )


def _by_run(name: str, value: Any) -> Column:
    measured, promised = value["measured"], value["predicted"]
    parents = {"tokens_per_second": value["parent"]["predicted_tokens_per_second"]}
    values = {"child": value["child"] | measured, "parent": value["parent"], "both": measured}
    return (
        _head("run", name, value, value["requested"]),
        values,
        {"child": promised, "parent": parents, "both": promised},
    )


def _by_evaluate(name: str, value: Any) -> Column:
    return _head("evaluate", name, value, value.get("workload")), value | {"both": value}, {}


def _by_bench(name: str, value: Any) -> Column:
    values, promised = (
        {w: value[w][side] or {} for w in ("child", "parent") if w in value} for side in (MEASURED, PREDICTED)
    )
    values["both"], promised["both"] = (
        {"speedup": value.get("speedup", {}).get(side)} for side in (MEASURED, PREDICTED)
    )
    return _head("bench", name, value, value["workload"]), values, promised


def _head(verb: str, name: str, value: Mapping[str, Any], work: Mapping[str, Any] | None) -> str:
    return f"{MEASURED} by {verb}, {name}: {value['device']}, {value['precision']}" + (
        f", {_work(work)}" if work else ""
    )


def _work(work: Mapping[str, Any]) -> str:
    return f"{work['input_len']} tokens in, {work['output_len']} out"


def frontier(run: Found) -> str:
    """And the children that were measured to choose among them."""
    solved = run.solved

    def drawn(told: str, path: Any) -> str:
        rows, facts = read_frontier(path)
        name, label, size = ON_AXIS[facts.get("axis", "throughput")]
        series = [Series("best, predicted", [(r[name] / size, r["score"]) for r in rows], 0, "dashed", "hollow")]
        if solved and facts.get("costs") == solved.costs and facts.get("workload") == asdict(solved.workload):
            place = getattr(solved.predicted, name) / size, solved.objective
            series.append(Series("child, predicted", [place], 1, "", "hollow"))
            for result in run.each("result", lambda _, value: value):
                if (there := result["measured"].get(name)) is not None:
                    series.append(Series("child, measured", [(there / size, result["child"]["kl"])], 1, "", "filled"))
        words = f"{told}: the least sum of scores at each limit, {len(rows)} points, predicted (hollow); filled is a child's KL, measured."
        return figure(chart("frontier", label, "sum of scores or KL, nats/token", series), words)

    def finalists(told: str, value: Any) -> str:
        points = [(one["sum_of_scores"], one["kl"]) for one in value["children"]]
        series = [
            Series("children", points, 0, "", "filled"),
            Series("lowest KL", [points[value["best"]]], 1, "", "filled"),
        ]
        made = chart("finalists", "sum of scores, nats/token (predicted)", "KL, nats/token (measured)", series)
        return figure(made, f"{told}: {len(points)} near-optimal children, measured whole.")

    return "".join([*run.each("frontier", drawn), *run.each("finalists", finalists)])


def tasks(run: Found) -> str:
    """In whatever words they come: a row a task, a column a figure."""

    def told(name: str, value: Any) -> str:
        found = value.get("tasks")
        if not found:
            return ""
        named = found.items() if isinstance(found, Mapping) else [(one["task"], one) for one in found]
        rows = {str(task): flat(one) for task, one in named}
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        every = [(task, *map(row.get, columns)) for task, row in rows.items()]
        return say(f"{name}, measured:") + table(("task", *columns), every)

    return "".join(made for kind in ("tasks", "evaluate", "result") for made in run.each(kind, told))


def continuations(run: Found) -> str:
    """Prompts as parent and child go on from them."""

    def told(name: str, value: Any) -> str:
        found = value.get("continuations")
        if not found:
            return ""
        made = say(f"{name}: sampled at temperature {found['temperature']:g}, seed {found['seed']:g}.")
        for one in found["texts"]:
            whole = "".join(
                f"<div><h3>{w}</h3><pre><b>{escape(one['prompt'])}</b>{escape(one[w])}</pre></div>"
                for w in ("parent", "child")
            )
            made += f'<div class="pair">{whole}</div>'
        return made

    return "".join(made for kind in ("result", "evaluate") for made in run.each(kind, told))


def flat(value: Any, within: str = "") -> dict[str, Any]:
    """{"goal": {"throughput": "2x"}} -> {"goal throughput": "2x"}; short lists as text, others counted."""
    if isinstance(value, Mapping):
        nested = [flat(one, f"{within} {name}".strip()) for name, one in value.items() if one is not None]
        return {name: one for some in nested for name, one in some.items()}
    if isinstance(value, list | tuple):
        short = len(value) <= 8 and not any(isinstance(one, Mapping | list) for one in value)
        value = (
            ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value)
            if short
            else f"{len(value)} entries"
        )
    return {within or "value": str(value).lower() if isinstance(value, bool) else value}
