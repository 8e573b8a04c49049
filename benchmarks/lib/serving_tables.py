"""What the results page says of figures measured in serving engines and of exports."""

from __future__ import annotations

from collections import Counter

from result_tables import NONE, Row, groups, number, table

BYTES = (("state_bytes", "our_state_bytes"), ("page_bytes", "our_page_bytes"))  # in an engine, and as we say


def serving(rows: list[Row]) -> str:
    def found(row: Row, model: str) -> Row:
        return next(r for r in rows if (r["engine"], r["how"], r["model"]) == (row["engine"], row["how"], model))

    lines = []
    for row in (r for r in rows if r["model"] == "child"):
        parent = found(row, "parent")
        lines.append([
            row["version"], row["how"], parent["tokens_per_s_median"], row["tokens_per_s_median"], f"{row['speedup']}x",
            f"{row['predicted_speedup']}x", f"{row['fit_speedup']}x" if row["fit_speedup"] else NONE,
            f"{parent['same_greedy_text']}, {row['same_greedy_text']}", row["rounds"],
        ])  # fmt: skip
    columns = ["engine", "how", "parent, tokens/s", "child", "measured", "predicted", "by the engine's fit"]
    return table([*columns, "same texts: parent, child", "rounds"], lines)


def serving_matrix(rows: list[Row]) -> str:
    engines = list(groups(rows, "engine", "format"))
    lines = []
    for (child,), found in groups(rows, "child").items():
        cells: dict[tuple[str, ...], str] = {
            (r["engine"], r["format"]): r["max_delta_over_std"] or r["verdict"] for r in found
        }
        lines.append([child, *(cells.get(engine, "") for engine in engines)])
    verdicts = Counter(row["verdict"] for row in rows)
    texts = Counter(row["same_greedy_tokens"] for row in rows if row["same_greedy_tokens"])
    head = (
        f"{len(rows)} cells: {', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}; greedy tokens that are "
        f"the same: {', '.join(f'{text} in {count}' for text, count in texts.items())}. max |Δlogit| / std:\n\n"
    )
    return head + table(["child", *(f"{engine}, {format}" for engine, format in engines)], lines)


def serving_matrix_gpu(rows: list[Row]) -> str:
    engines = list(groups(rows, "engine", "format"))
    lines = []
    for (child,), found in groups(rows, "child").items():
        cells: dict[tuple[str, ...], str] = {
            (r["engine"], r["format"]): f"{r['after']} ({r['verdict']})" if r["after"] else r["verdict"] for r in found
        }
        plain = next((r["plain_after"] for r in found if r["plain_after"]), NONE)
        lines.append([child, plain, *(cells.get(engine, "") for engine in engines), held(found)])
    runs = max((int(r["plain_runs"]) for r in rows if r.get("plain_runs")), default=1)
    largest = f", with experts the largest of {runs} roundings" if runs > 1 else ""
    head = f"Mean |Δ log p| to our float32 after prompts of 17 to 3,000 tokens, 32 at once, in bf16; 'ours': that of our own bf16{largest}.\n\n"
    columns = ["child", "ours", *(f"{engine}, {format}" for engine, format in engines), "bytes of a sequence"]
    with_bytes = any(line[-1] != NONE for line in lines)  # earlier files have none
    return head + table(columns if with_bytes else columns[:-1], lines if with_bytes else [line[:-1] for line in lines])


def held(rows: list[Row]) -> str:
    """Of one child: what its layers keep of a sequence, and the engine's pages for it, each where the engine's count is ours."""
    counted = [r for r in rows if r.get("state_bytes")]
    if not counted:
        return NONE
    said = {
        tuple(
            f"{int(r[their]):,}" + ("" if r[their] == r[ours] else f" (we say {int(r[ours]):,})")
            for their, ours in BYTES
        )
        for r in counted
    }
    return "; ".join(f"{kept} in {pages} of pages" for kept, pages in sorted(said))


def engine_promise(rows: list[Row]) -> str:
    lines = []
    for (shapes, precision, model, format), found in groups(rows, "shapes", "precision", "model", "format").items():
        by = {r["what"]: r for r in found}
        off = [
            f"{100 * (float(r['measured_over_promised']) - 1):+.1f} %"
            for r in by.values()
            if r["measured_over_promised"]
        ]
        tokens = by["tokens_per_second"]
        lines.append(
            [shapes, precision, model, format, number(tokens["promised"], 0), number(tokens["measured"], 0), *off]
        )
    columns = ["shapes", "weights", "model", "format", "tokens/s promised", "measured"]
    return "Measured less promised:\n\n" + table(
        [*columns, "tokens/s", "first token", "later tokens", "memory", "cached tokens"], lines
    )


def export(rows: list[Row]) -> str:
    return table(
        ["format", "layers", "child, GB", "written, GB", "peak memory, GB", "seconds", "killed at, GB", "left under its name"],
        (
            [r["format"], r["num_layers"], r["source_gb"], r["written_gb"], r["peak_resident_gb"], r["seconds"],
             r["killed_at_gb"], "nothing" if r["nothing_under_final_name"] == "True" else "something"]
            for r in rows
        ),
    )  # fmt: skip


# ---- solver


def fp8_logprobs(rows: list[Row]) -> str:
    first = rows[0]
    head = f"{first['prompts']} prompts of 17 to {int(first['longest']):,} tokens, 32 at once; log-probabilities of the next token.\n\n"
    return head + table(
        ["child", "what", "against ours", "mean |Δ log p|", "max", "same greedy texts"],
        (
            [r["child"], r["of"], r["against"], number(r["mean"], 3), number(r["max"], 2), f"{r['texts_equal']} of {r['texts']}"]
            for r in rows
        ),
    )  # fmt: skip
