"""Tables of docs/results.md about choosing a child and what it is worth. As in `result_tables.py`, of rows as text."""

from __future__ import annotations

import re

from result_tables import NONE, Row, groups, number, table

ORDER = ("mip", "finalists", "pairs", "rescored", "all", "steps", "depth", "uniform", "uniform-width", "greedy", "random")  # fmt: skip


def _shown(value: str, digits: int, times: str = "1") -> str:
    return number(value, digits, times) if value not in ("", "nan") else NONE


def _sorted(rows: list[Row]) -> list[Row]:
    known = [row for row in rows if row["method"] in ORDER]
    return sorted(known, key=lambda row: (float(row["speed"]), ORDER.index(row["method"])))


def selection(rows: list[Row]) -> str:
    """How near-optimal children are ranked at each speed; then a line per way to choose."""
    ranks = sorted((row for row in rows if row["kind"] == "rank"), key=lambda row: float(row["speed"]))
    ranked = table(
        ["speed", "children", "rank by sums", "by interactions", "by new scores", "KL over sums", "over interactions", "over new scores"],
        (
            [f"{float(r['speed']):g}x", r["children"], *(_shown(r[name], 3) for name in ("spearman", "spearman_pairs", "spearman_rescored")),
             *(_shown(r[name], 2) for name in ("ratio", "predicted", "rescored"))]
            for r in ranks
        ),
    )  # fmt: skip
    methods = _sorted([row for row in rows if row["kind"] == "method"])
    alone = {row["speed"]: float(row["kl_other"]) for row in methods if row["method"] == "mip"}

    def beside(row: Row) -> str:
        if row["method"] == "mip" or row["speed"] not in alone:
            return NONE
        return f"{100 * (float(row['kl_other']) / alone[row['speed']] - 1):+.1f} %"

    ways = table(
        ["speed", "method", "sum of scores", "KL", "±", "on other text", "against mip there", "children measured", "s"],
        (
            [f"{float(r['speed']):g}x", r["method"], number(r["sum_of_scores"], 4), number(r["kl"], 4), number(r["kl_stderr"], 4),
             number(r["kl_other"], 4), beside(r), r["children"], number(r["seconds"], 0)]
            for r in methods
        ),
    )  # fmt: skip
    said = "Spearman's correlation with the KL of children near the optimum, and medians of their KL over what is said of it."
    told = (
        "KL of the child that each way chose, on the text that chose it and on as much other text, which no choice saw."
    )
    return "\n\n".join(([said, ranked] if ranks else []) + [told, ways])


def chosen(rows: list[Row]) -> str:
    """A line per method: speed, KL and loss before and after healing, minutes; then the tasks."""
    lines = []
    for r in _sorted(rows):
        minutes = [_shown(r[name], 2, str(1 / 60)) for name in ("library_s", "choose_s", "heal_s")]
        lines.append([
            f"{r['speed']}x", r["method"], _shown(r["promised"], 3), _shown(r["measured"], 3), r["changed"] or NONE,
            *(one for k in ("kl", "kl_healed") for one in (_shown(r[k], 4), _over_mip(r, k))), *(_shown(r[name], 3) for name in ("loss", "loss_healed")),
            *minutes,
        ])  # fmt: skip
    columns = ["speed", "method", "promised", "measured", "other sub-blocks than mip", "KL", "over mip's", "healed", "over mip's", "loss", "healed", "library, min", "choosing, min", "healing, min"]  # fmt: skip
    tokens = max((int(r["healed_tokens"]) for r in rows if r["healed_tokens"]), default=0)
    losses = sorted({number(r["parent_loss"], 3) for r in rows if r["parent_loss"]})
    head = f"Healed on {tokens:,} tokens; the parent's loss is {', '.join(losses) or NONE}. Minutes of a GPU with nothing beside: scores are the library's."
    return "\n\n".join([head, table(columns, lines), *_tasks(_sorted(rows))])


def _over_mip(row: Row, kl: str) -> str:
    """How much more than the MIP's child, and the error of that."""
    more, error = (row[f"{kl}_over_mip{ends}"] for ends in ("", "_stderr"))
    return NONE if more == "" else f"{float(more):+.4f} ± {float(error):.4f}"


def _tasks(rows: list[Row]) -> list[str]:
    """Percent of right answers and intervals of 95 %, as `puzzle evaluate --tasks` gives them, and how much more than the parent's, question by
    question; none where no task was asked."""
    lines, tasks = dict[tuple[str, ...], dict[str, str]](), dict[str, None]()
    for row in rows:
        for column, told in (("tasks_before", "child"), ("tasks", "healed child")):
            for task, metric, who, *numbers in re.findall(
                r"(\S+) (\S+) (\S+) (\S+) \[(\S+), (\S+)\]", row[column] or ""
            ):
                mean, low, high = (number(one, 1, "100") for one in numbers)
                name = f"{task}, {metric.removesuffix(',none').replace(',', ' ')}"
                key = ("", "parent") if who == "parent" else (f"{row['speed']}x", f"{row['method']}, {told}")
                cells = lines.setdefault(key, {})
                tasks.setdefault(name)
                if who == "difference":
                    cells[name] += f" ({'' if mean.startswith('-') else '+'}{mean} [{low}, {high}])"
                else:
                    cells[name] = f"{mean} [{low}, {high}]"
    if not lines:
        return []
    shown = ([*key, *(cells.get(task, NONE) for task in tasks)] for key, cells in lines.items())
    return [
        "Right answers in percent, with intervals of 95 % (and what they are above the parent's, question by question):",
        table(["speed", "model", *tasks], shown),
    ]


def coupled(rows: list[Row]) -> str:
    """A line per way to train once more."""
    lines = []
    for (target, mix, healed), same in groups(rows, "target", "mix", "healed_tokens").items():
        r = same[0]
        way = "as it was" if target == "none" else target
        lines.append([
            way, mix, number(r["kl"], 4), number(r["loss"], 3), number(r["seconds"], 0), f"{int(healed):,}",
            number(r["kl_healed"], 4), number(r["loss_healed"], 3), number(r["heal_s"], 0),
        ])  # fmt: skip
    head = f"{int(rows[0]['tokens']):,} tokens of the second pass, at {rows[0]['lr']}.\n\n"
    return head + table(
        ["held against", "mix", "KL", "loss", "s", "healed tokens", "KL healed", "loss healed", "s"], lines
    )
