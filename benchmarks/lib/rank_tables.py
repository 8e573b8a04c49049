"""Tables of docs/results.md about GPUs that share a model or a task. As in `result_tables.py`, of rows as text."""

from __future__ import annotations

from result_tables import NONE, Row, groups, number, table


def published_child(rows: list[Row]) -> str:
    """The child beside the papers' figures; then a line per model, in groups of one deployment, batches side by side."""
    lines, beside = [], [["the papers'", "8", "of 8", "fp8", "1.119", "1.71"]]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    for (device, tp, shares, precision, model), same in groups(
        rows, "device", "tp", "shares", "precision", "model"
    ).items():
        of = {row["batch"]: row for row in same}

        def cells(column: str, digits: int, times: str = "1", of: dict[str, Row] = of) -> str:
            return " / ".join(
                number(of[b][column], digits, times) if b in of and of[b][column] else NONE for b in batches
            )

        first = same[0]
        lines.append([
            device, tp, shares, precision, model, number(first["parameters_B"], 1), first["all_reduces_per_token"],
            number(first["weight_bytes"], 1, "1e-9"), cells("p50_s", 2, "1000"), cells("speedup_over_parent", 2),
            cells("speedup_over_unfused", 3),
        ])  # fmt: skip
        if model == "fused":
            gains = cells("speedup_over_unfused", 3), cells("speedup_over_parent", 3)
            beside.append([f"ours, {device}", tp, f"of {shares}", precision, *gains])
    largest = max(int(row["tp"]) for row in rows)
    told = [
        f"Speed-ups of a decode step at batch {' / '.join(batches)}, {rows[0]['context']} cached tokens, in our runtime; the papers' "
        "(arXiv 2503.18908, 2505.00949) are of eight H100 in their engine. Share: the part of every sub-block that a GPU runs; its sums go over "
        "as many GPUs as were there.",
        ""
        if largest >= 8
        else f" TP 8 itself was not run: shares of eight ran on {largest} GPUs, with sums over {largest}.",
        " Weights are random, and layers of one shape take turns with those that fit (`distinct_weight_bytes` of `weight_bytes`). The widths of the 77 "
        "FFNs that were not fused, and of the 49 before they were, are not the model's own, only their sum is.",
    ]
    compared = table(["", "GPUs", "share", "precision", "fused over unfused", "child over parent"], beside)
    head = "".join(told) + f"\n\n{compared}\n\n"
    columns = [
        "device",
        "GPUs",
        "shares",
        "precision",
        "model",
        "parameters, 10⁹",
        "sums",
        "weights, GB a GPU",
        "step, ms",
    ]
    return head + table([*columns, "over the parent", "over unfused"], lines)


def tp_children(rows: list[Row]) -> str:
    """A line per model: promised, measured, and their ratio."""
    shown = {"latency_seconds": (2, "1"), "ttft_seconds": (0, "1000"), "tpot_seconds": (2, "1000"),
             "tokens_per_second": (0, "1"), "memory_bytes": (1, "1e-9")}  # fmt: skip
    lines = []
    parents: dict[tuple[str, ...], Row] = {}
    for (device, shapes, tp, batch, goal), same in groups(rows, "device", "shapes", "tp", "batch", "goal").items():
        of = {row["quantity"]: row for row in same}
        cells = []
        for quantity, (digits, times) in shown.items():
            pair = [
                number(of[quantity][k], digits, times) if of[quantity][k] else NONE for k in ("promised", "measured")
            ]
            cells.append(f"{', '.join(pair)} ({of[quantity]['measured_over_promised'] or NONE})")
        latency = {k: of["latency_seconds"][k] for k in ("promised", "measured")}
        parent = parents.setdefault((device, shapes, tp, batch), latency)
        shares = [
            number(float(latency[k]) / float(parent[k]), 3) if latency[k] and parent[k] else NONE for k in latency
        ]
        lines.append([
            device, shapes, goal or "parent", number(same[0]["parameters_B"], 1), batch, ", ".join(shares), *cells,
        ])  # fmt: skip
    first = rows[0]
    head = (
        f"{first['input_len']} tokens in, {first['output_len']} out, {first['precision']}, random weights; all-reduces measured on "
        f"{' and '.join(dict.fromkeys(row['all_reduces_of'] for row in rows))}. Pairs are promised, measured (measured over promised).\n\n"
    )
    columns = [
        "device",
        "shapes",
        "goal",
        "parameters, 10⁹",
        "batch",
        "latency of the parent's",
        "latency, s",
        "TTFT, ms",
    ]
    return head + table([*columns, "TPOT, ms", "tokens/s", "memory, GB a GPU"], lines)


def ranks(rows: list[Row]) -> str:
    """A line per stage and number of processes."""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    rows = sorted(rows, key=lambda row: (row["parent"], stages.index(row["stage"]), int(row["ranks"])))
    return table(
        ["stage", "processes", "parent", "tokens", "s", "tokens/s", "times of one", "whole command, s", "KL before", "KL"],
        (
            [r["stage"], r["ranks"], r["parent"], number(r["num_tokens"], 0), number(r["seconds"], 1),
             number(r["tokens_per_second"], 0), r["times_of_one"] or NONE,
             number(r["wall_seconds"], 1), number(r["kl_before"], 4) if r["kl_before"] else NONE, number(r["kl"], 6)]
            for r in rows
        ),
    )  # fmt: skip


def evaluate_ranks(rows: list[Row]) -> str:
    runs = {"whole": "", "again": "after one of them was killed"}
    return table(
        ["GPUs", "run", "tokens", "seconds", "times one", "text, s", "in all, s", "KL"],
        (
            [r["ranks"], runs[r["run"]], f"{int(r['num_tokens']):,}", number(r["seconds"], 1), number(r["times_of_one"], 2),
             number(r["text_seconds"], 1), number(r["wall_seconds"], 1), number(r["kl"], 10)]
            for r in rows
        ),
    )  # fmt: skip
