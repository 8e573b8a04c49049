"""Tables of docs/results.md about scores and evaluation of large parents. As in `result_tables.py`, of rows as text."""

from __future__ import annotations

from result_tables import NONE, Row, number, percent, table


def large_parents(rows: list[Row]) -> str:
    def gigabytes(value: str) -> str:
        return number(value, 2, "1e-9")

    return "Planned, measured GB; of the device allocated and reserved, of the host private memory and pinned.\n\n" + table(
        ["run", "parent", "layers", "what", "tokens", "candidates", "seconds", "a candidate, s", "GPU, GB", "host, GB"],
        (
            [r["run"], r["parent"], r["layers"], r["what"], f"{int(r['sequences']) * int(r['seq_len']):,}", r["num_candidates"] or NONE,
             number(r["seconds"], 1),
             number(float(r["seconds"]) / int(r["num_candidates"]), 2) if r["num_candidates"] else NONE,
             f"{gigabytes(r['planned_device_bytes'])}, {gigabytes(r['peak_bytes'])} ({gigabytes(r['reserved_bytes'])})",
             f"{gigabytes(r['planned_host_bytes'])}, {gigabytes(r['host_bytes'])} ({gigabytes(r['pinned_bytes'])})"]
            for r in rows
        ),
    )  # fmt: skip


def screen(rows: list[Row]) -> str:
    first = rows[0]
    head = (
        f"{first['parent']}, {first['blocks']} blocks: Spearman {number(first['spearman'], 3)} (attention "
        f"{number(first['spearman_attention'], 3)}, FFN {number(first['spearman_ffn'], 3)}). The screen read "
        f"{int(first['screen_tokens']):,} tokens in {number(first['screen_seconds'], 1)} s, the exact scores "
        f"{int(first['score_tokens']):,} in {number(first['score_seconds'], 1)} s.\n\n"
    )
    columns = ["left out", "blocks", "of these among as many worst by score", "best rank by score among them"]
    lines = ([percent(r["fraction"], 0), r["dropped"], r["among_worst"], r["least_rank"]] for r in rows)
    return head + table(columns, lines)
