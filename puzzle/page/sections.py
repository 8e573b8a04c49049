"""Sections of what was chosen, promised and measured: each gives HTML, or "" where nothing is found. All text from files goes through
`table`, `say`, `figure` or a chart, which escape it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from typing import Any

from puzzle.base.units import bytes_text, layer_name
from puzzle.choose.frontier import read_frontier
from puzzle.export.picture import LEGEND
from puzzle.measure.architecture import Architecture
from puzzle.page.found import Found, numbers, understood
from puzzle.page.svg import Cell, Series, chart, grid, number

PREDICTED, MEASURED = "predicted", "measured"
WHO = ("child", "parent", "both")
ON_AXIS = {  # of a frontier: the figure that stands on it, its label, its size
    "throughput": ("tokens_per_second", "tokens/s", 1.0),
    "latency": ("latency_seconds", "latency of a request, s", 1.0),
    "memory": ("memory_bytes", "weights and KV cache, GB", 1e9),
}
FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "both speedup": ("speed-up, each at its best batch", "{:.3g}×".format),
    "child tokens_per_second": ("tokens/s", "{:,.5g}".format),
    "parent tokens_per_second": ("\u2003of the parent", "{:,.5g}".format),
    "child batch": ("batch", "{:,}".format),
    "parent batch": ("\u2003of the parent", "{:,}".format),
    "child ttft_seconds": ("time to first token, s", "{:.4g}".format),
    "child tpot_seconds": ("time per later token, s", "{:.4g}".format),
    "child memory_bytes": ("weights and KV cache", bytes_text),
    "parent memory_bytes": ("\u2003of the parent", bytes_text),
    "child kv_bytes_per_token": ("KV bytes per token", "{:,}".format),
    "parent kv_bytes_per_token": ("\u2003of the parent", "{:,}".format),
    "child num_parameters": ("parameters", "{:,}".format),
    "parent num_parameters": ("\u2003of the parent", "{:,}".format),
    "child kl": ("KL to the parent, nats/token", "{:.4f}".format),
    "child sum_of_scores": ("sum of scores, nats/token", "{:.4f}".format),
    "child loss": ("held-out loss, nats/token", "{:.4f}".format),
    "parent loss": ("\u2003of the parent", "{:.4f}".format),
    "child top1_agreement": ("top-1 agreement", "{:.1%}".format),
}
Figures = Mapping[str, Any]  # of "child", "parent" and "both", by name
Column = tuple[str, Figures, Figures]  # head, figures, what was promised of them


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """words: how many columns, from the left, hold words and not figures. A head that begins with PREDICTED or MEASURED has its mark."""

    def cell(kind: str, place: int, value: Any) -> str:
        told = number(value) if isinstance(value, int | float) else escape("" if value is None else str(value))
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
    if (solved := run.solved) is None:
        return ""

    def cell(n: int, slot: str) -> Cell | None:
        if slot not in solved.sub_blocks[n]:
            return None
        own, whole = solved.sub_blocks[n][slot], solved.parent.layers[n][slot]
        told = "as the parent" if own == whole else own.words(whole)
        told += ", fp8" if (n, slot) in solved.fp8_weights else ""
        mark, share = own.symbol(whole), min(1.0, own.num_parameters / max(1, whole.num_parameters))
        return Cell(f"{layer_name(n)} {slot}: {told}", fill=share, mark="" if mark in "█▁▂▃▄▅▆▇" else mark)

    rows = [(slot, [cell(n, slot) for n in range(len(solved.layers))]) for slot in solved.parent.slots]
    kept = sum(a == b for a, b in zip(solved.sub_blocks, solved.parent.layers, strict=True))
    words = f"{next(iter(run.architectures))}: {len(solved.layers)} layers, {kept} as in the parent. Filled: share of the parent's "
    words += "parameters." + "".join(f" {one}." for one in LEGEND.split("   ") if one[0] not in "█▁")
    drawn = figure(grid("architecture", rows, 34, "layer"), words)
    every = [(name, one.speedup, one.objective, one.predicted.batch) for name, one in run.architectures.items()]
    heads = (f"{PREDICTED} {one}" for one in ("speed-up", "sum of scores, nats/token", "best batch"))
    return drawn + (table(("", *heads), every) if len(every) > 1 else "")


def promise(run: Found) -> str:
    """A column a source: the architecture's promise, then all that measured it."""
    measured = (
        run.each("result", partial(_by_run, run.solved)),
        run.each("evaluate", _by_evaluate),
        run.each("bench", _by_bench),
    )
    columns = [*_promised(run), *(column for one in measured for column in one if column is not None)]
    rows = []
    for name, (label, form) in FIGURES.items():
        who, key = name.split()
        cells = []
        for _, figures, promised in columns:
            value, error, held = (
                side.get(who, {}).get(k) for side, k in ((figures, key), (figures, f"{key}_stderr"), (promised, key))
            )
            told = "" if value is None else form(value) + ("" if error is None else f" ± {error:.4f}")
            cells.append(told + (f" ({value / held:.3f})" if told and held else ""))
        rows += [(label, *cells)] if any(cells) else []
    note = "In brackets: measured over predicted, both for one machine. A sum of scores predicts an order of children, not their KL."
    note += " The scores are synthetic: speed and size are what counts here." * bool(
        run.solved and run.solved.synthetic_scores
    )
    note += " Run measures the child after healing; the promise is for the child before." * bool(run.files["heal"])
    return table(("", *(head for head, _, _ in columns)), rows) + say(note) if rows else ""


def _column(head: str, figures: Figures, promised: Figures, about: Any, work: Any) -> Column:
    """about: what has the device and the precision."""
    for side in (figures, promised):
        every = [(f"{who} {k.removesuffix('_stderr')}", v) for who in WHO for k, v in side.get(who, {}).items()]
        numbers(*(v for name, v in every if name in FIGURES))
    told = f"{work['input_len']} tokens in, {work['output_len']} out" if work else "no speed"
    return f"{head} {about['device']}, {about['precision']}, {told}", figures, promised


def _promised(run: Found) -> Iterator[Column]:
    if (solved := run.solved) is None:
        return
    with understood(run.files["architecture"][0]):
        child = asdict(solved.predicted) | {"sum_of_scores": solved.objective}
        figures = {"child": child, "parent": asdict(solved.parent_predicted), "both": {"speedup": solved.speedup}}
        about = {"device": solved.costs["device"], "precision": solved.precision}
        yield _column(f"{PREDICTED} for", figures, {}, about, asdict(solved.workload))
        if (found := solved.measured) is not None:
            numbers(*found.values())
            yield f"{MEASURED} when it was chosen, {found['num_tokens']:,} tokens", {"child": found}, {}


def _by_run(solved: Architecture | None, name: str, value: Any) -> Column | None:
    found, told = value["measured"], value["predicted"]
    figures = {"child": value["child"] | found, "parent": value["parent"], "both": found}
    del figures["child"]["sum_of_scores"]  # which was not measured
    parent = {"tokens_per_second": value["parent"]["predicted_tokens_per_second"]}
    unmeasured = found["tokens_per_second"] is None
    for who in ("child", "parent") if unmeasured else ():
        del figures[who]["batch"]
    work = None if unmeasured else value["requested"]
    promised = {"child": told, "parent": parent, "both": told}
    here = solved is not None and solved.costs["device"] == value["device"]
    return _column(f"{MEASURED} by run, {name}:", figures, promised if here else {}, value, work)


def _by_evaluate(name: str, value: Any) -> Column | None:
    if "tasks" in value and "child" not in value:
        return None
    figures = {"child": value["child"], "parent": value["parent"], "both": value}
    return _column(f"{MEASURED} by evaluate, {name}:", figures, {}, value, value.get("workload"))


def _by_bench(name: str, value: Any) -> Column | None:
    value = {"parent": {}, "speedup": {}} | value
    value["child"][MEASURED]["tokens_per_second"]  # what a bench is
    sides = [
        {who: value[who].get(s) or {} for who in WHO[:2]} | {"both": {"speedup": value["speedup"].get(s)}}
        for s in (MEASURED, PREDICTED)
    ]
    return _column(f"{MEASURED} by bench, {name}:", sides[0], sides[1], value, value["workload"])


def frontier(run: Found) -> str:
    """And the children that were measured to choose among them."""
    solved = run.solved

    def drawn(told: str, path: Any) -> str:
        rows, facts = read_frontier(path)
        name, label, size = ON_AXIS[facts.get("axis", "throughput")]
        series = [Series("best, predicted", [(r[name] / size, r["score"]) for r in rows], 0, "dashed", "hollow")]
        if solved and facts.get("costs") == solved.costs and facts.get("workload") == asdict(solved.workload):
            there = getattr(solved.predicted, name) / size, solved.objective
            series.append(Series("child, predicted", [there], 1, "", "hollow"))
            ran = run.each("result", lambda _, value: (value["measured"].get(name), value["child"]["kl"]))
            series += [Series("child, measured", [(x / size, kl)], 1, "", "filled") for x, kl in ran if x is not None]
        words = f"{told}: the least sum of scores at each limit, {len(rows)} points, predicted (hollow)."
        words += f" Filled: the child's KL as run measured it{', after healing' * bool(run.files['heal'])}." * (
            len(series) > 2
        )
        return figure(chart("frontier", label, "sum of scores or KL, nats/token", series), words)

    def finalists(told: str, value: Any) -> str:
        points = [(one["sum_of_scores"], one["kl"]) for one in value["children"]]
        numbers(*(figure for point in points for figure in point))
        if type(value["best"]) is not int or not 0 <= value["best"] < len(points):
            raise ValueError(f"best {value['best']!r} is none of {len(points)} children")
        best = Series("lowest KL", [points[value["best"]]], 1, "", "filled")
        labels = ("finalists", "sum of scores, nats/token (predicted)", "KL, nats/token (measured)")
        made = chart(*labels, [Series("children", points, 0, "", "filled"), best])
        return figure(made, f"{told}: {len(points)} children that were measured whole.")

    return "".join([*run.each("frontier", drawn), *run.each("finalists", finalists)])


def tasks(run: Found) -> str:
    """A row a task and metric, a column a model or difference; what has no metrics, a column a figure in whatever words it comes."""

    def told(name: str, value: Any) -> str:
        rows = []
        for task, one in (value.get("tasks") or {}).items():
            for metric, each in one.get("metrics", {"": one}).items():
                shown = (
                    each
                    if each is one
                    else {"documents": one.get("documents"), **each, **one["differences"].get(metric, {})}
                )
                rows.append({"task": task, "metric": metric or None, **flat(shown)})
                numbers(*(figure for figure in rows[-1].values() if isinstance(figure, float)))
        columns = list(dict.fromkeys(key for row in rows for key in row))
        head = say(f"{name}: measured on {value.get('device', 'an unnamed device')}; [intervals].")
        return head + table(columns, [[row.get(key) for key in columns] for row in rows], 2) if rows else ""

    return "".join(made for kind in ("tasks", "evaluate", "result") for made in run.each(kind, told))


def continuations(run: Found) -> str:
    """Prompts as parent and child go on from them."""

    def told(name: str, value: Any) -> str:
        found, made = value.get("continuations") or {"texts": []}, ""
        for one in found["texts"]:
            both = (
                f"<h3>{who}</h3><pre><b>{escape(one['prompt'])}</b>{escape(one[who])}</pre>"
                for who in ("parent", "child")
            )
            made += f'<div class="pair">{"".join(f"<div>{half}</div>" for half in both)}</div>'
        return made and say(f"{name}: sampled at temperature {found['temperature']}, seed {found['seed']}.") + made

    return "".join(made for kind in ("result", "evaluate") for made in run.each(kind, told))


def flat(value: Any, within: str = "") -> dict[str, Any]:
    """{"goal": {"throughput": "2x"}} -> {"goal throughput": "2x"}; means with their intervals, short lists as text, others counted."""
    if isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys():
        low, high = value["low"], value["high"]
        numbers(value["mean"], low, high)
        value = f"{value['mean']:.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")
    elif isinstance(value, Mapping):
        nested = [flat(one, f"{within} {name}".strip()) for name, one in value.items() if one is not None]
        return {name: one for some in nested for name, one in some.items()}
    elif isinstance(value, list | tuple):
        plain = len(value) <= 8 and not any(isinstance(one, Mapping | list) for one in value)
        value = ", ".join(map(str, value)) if plain else f"{len(value)} entries"
    return {within or "value": str(value).lower() if isinstance(value, bool) else value}
