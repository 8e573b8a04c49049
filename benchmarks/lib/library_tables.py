"""Tables of docs/results.md about blocks: how they start, what distillation makes of them, children of mixtures. As in `result_tables.py`, of rows as text."""

from __future__ import annotations

from result_tables import NONE, Row, groups, number, percent, table


def bld(rows: list[Row]) -> str:
    first = rows[0]
    built = f", built in {first['build_seconds']} s" if first["build_seconds"] else ""
    rates = list(dict.fromkeys(r["lr"] for r in rows))
    head = f"{int(first['tokens']):,} tokens at {', '.join(rates)}{built if len(rates) == 1 else ''}.\n\n"
    told = {"sub-block": "kind", "variant": "variant"} | ({"rate": "lr"} if len(rates) > 1 else {})
    columns = [
        *told,
        "nMSE at init",
        "where training ended",
        "KL at init",
        "of what is kept",
        "KL lowered by",
        "in layers",
    ]
    return head + table(
        columns,
        (
            [*(r[name] for name in told.values()), number(r["nmse_init"], 3), number(r["nmse_trained"], 3), number(r["kl_init"], 4),
             number(r["kl_trained"], 4), percent(r["kl_lowered_by"], 0), f"{r['layers_lowered']} of {r['num_layers']}"]
            for r in rows
        ),
    )  # fmt: skip


def mixtures(rows: list[Row]) -> str:
    def shown(value: str) -> str:
        return number(value, 4) if value else NONE

    healed = next((r["healed_tokens"] for r in rows if r["healed_tokens"]), "")
    head = (
        f"The parent's loss is {number(rows[0]['parent_loss'], 4)}; healed on {int(healed):,} tokens.\n\n"
        if healed
        else ""
    )
    columns = ["goal", "rule", "speed, predicted", "parameters, M", "active, M", "KL", "loss", "KL healed", "loss"]
    lines, rules = [], [rule for (rule,) in groups(rows, "rule")]
    for (goal,), same in groups(rows, "goal").items():
        children = {r["rule"]: r for r in same}
        for rule in rules:
            if (r := children.get(rule)) is None:
                lines.append([goal, rule, "none meets the goal", *[NONE] * 6])
                continue
            lines.append([
                goal, rule, f"{number(r['predicted_speedup'], 2)}x", number(r["parameters"], 2, "1e-6"), number(r["active_parameters"], 2, "1e-6"),
                shown(r["kl"]), shown(r["lm_loss"]), shown(r["kl_healed"]), shown(r["lm_loss_healed"]),
            ])  # fmt: skip
    return head + table(columns, lines)


def linear(rows: list[Row]) -> str:
    layers = [layer for (layer,) in groups(rows, "layer") if layer != "median"]
    told = f"Medians over layers {', '.join(layers)}; {int(rows[0]['tokens']):,} tokens at {rows[0]['lr']}."
    return f"{told}\n\n" + table(
        ["in place of", "map", "initialisation", "nMSE at init", "where training ended", "KL at init", "of what is kept"],
        (
            [r["slot"], r["map"], r["initialisation"],
             *(number(r[column], 3) for column in ("nmse", "nmse_trained", "kl", "kl_trained"))]
            for r in rows
            if r["layer"] == "median"
        ),
    )  # fmt: skip


def nested(rows: list[Row]) -> str:
    """A line per way and number of tokens: KL of every width, alone in its parent."""
    widths = list(dict.fromkeys(r["width"] for r in rows))
    lines = []
    for (way, tokens, seconds), same in groups(rows, "way", "num_tokens", "seconds").items():
        kl = {r["width"]: number(r["kl"], 5) for r in same}
        lines.append([way, f"{int(tokens):,}", seconds, *(kl[w] for w in widths)])
    return table(["way", "tokens", "s", *(f"KL at {w}" for w in widths)], lines)
