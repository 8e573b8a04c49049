"""The rows of each CSV (or the value of each JSON) in benchmarks/results as the table of docs/results.md that shows them.

Every function takes the rows as text, {column: value} each, and gives Markdown. Figures are the file's own, rounded, or what
is computed from them here: medians, means, extremes, ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from statistics import mean, median
from typing import Any

Row = dict[str, str]
NONE = "–"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def groups(rows: list[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows with the same values in `columns`, in order of their first one."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[c] for c in columns), []).append(row)
    return found


def number(value: str | float, digits: int, times: str = "1") -> str:
    """`times` the value with `digits` decimals, halves away from zero: 2.125 as the file has it is 2.13."""
    unit = Decimal(1).scaleb(-digits)
    return f"{(Decimal(str(value)) * Decimal(times)).quantize(unit, ROUND_HALF_UP):,}"


def percent(value: str | float, digits: int = 1) -> str:
    return f"{number(value, digits, '100')} %"


def short_time(seconds: str | float) -> str:
    value = float(seconds)
    return f"{value * 1e6:.4g} µs" if value < 1e-3 else f"{value * 1e3:.4g} ms"


def milliseconds(seconds: str, digits: int) -> str:
    return number(seconds, digits, "1000")


# ---- kernels


def ways(*point: str) -> Callable[[list[Row]], str]:
    """A row per point, a column per way to compute it: time, and the share of the datasheet's ceiling."""

    def build(rows: list[Row]) -> str:
        names = list(dict.fromkeys(row["way"] for row in rows))
        lines = []
        for values, found in groups(rows, *point).items():
            cells = {r["way"]: f"{short_time(r['seconds'])}, {percent(r['share_of_datasheet'])}" for r in found}
            lines.append([*(v or NONE for v in values), *(cells.get(name, NONE) for name in names)])
        head = "Time, and share of the datasheet's bandwidth or FLOP/s.\n\n"
        return head + table([*(p.replace("_", " ") for p in point), *names], lines)

    return build


def skinny(rows: list[Row]) -> str:
    counts = list(dict.fromkeys(row["rows"] for row in rows))
    lines = []
    for (kind, height, width, dtype, size), found in groups(
        rows, "kind", "weight_rows", "columns", "dtype", "megabytes"
    ).items():
        shares = {(r["rows"], r["way"]): percent(r["share_of_datasheet"]) for r in found}
        cells = [f"{shares[c, 'skinny']} / {shares.get((c, 'cublas'), NONE)}" for c in counts]
        lines.append([kind, f"{height} × {width}", dtype, size, *cells])
    head = "Share of the datasheet's bandwidth, ours / cuBLAS.\n\n"
    return head + table(["product", "weight", "dtype", "MB", *(f"{c} row{'s' * (c != '1')}" for c in counts)], lines)


def linear_kl(rows: list[Row]) -> str:
    return table(
        ["way", "pass", "time", "extra memory, GB", "share of datasheet"],
        (
            [r["way"], r["pass"], short_time(r["seconds"]), r["extra_gigabytes"], percent(r["share_of_datasheet"])]
            for r in rows
        ),
    )


# ---- speed


def parent_decode(rows: list[Row]) -> str:
    return table(
        ["shapes", "dtype", "batch", "context", "a step", "over the limit measured", "over the datasheet's"],
        (
            [r["shapes"], r["dtype"], r["batch"], r["context"], short_time(r["seconds"]), r["over_measured_limit"],
             r["over_datasheet_limit"]]
            for r in rows
        ),
    )  # fmt: skip


def predict(rows: list[Row]) -> str:
    def line(name: str, batch: str, context: str, found: list[Row]) -> list[str]:
        errors = [abs(float(r["error"])) for r in found]
        return [name, batch, context, str(len(found)), percent(mean(errors), 2), percent(max(errors), 2)]

    lines = [line(phase, "all", "all", found) for (phase,), found in groups(rows, "phase").items()]
    points = groups(
        sorted(rows, key=lambda r: (r["phase"], int(r["batch"]), int(r["context"]))), "phase", "batch", "context"
    )
    lines += [line(phase, batch, context, found) for (phase, batch, context), found in points.items()]
    head = f"{len(groups(rows, 'architecture'))} architectures; the error is that of the predicted time.\n\n"
    return head + table(["phase", "batch", "tokens", "points", "mean error", "largest"], lines)


def road(rows: list[Row]) -> str:
    names = ("promised", "run", "evaluate", "bench")
    lines = [
        [
            f"{r['goal']}x", *(f"{number(r[name], 3)}x" for name in names), number(r["promised_tokens_per_second"], 0),
            number(r["tokens_per_second"], 0), *(f"{float(r[k]) / 1e9:.3f}" for k in ("predicted_memory_bytes", "memory_bytes")),
            number(r["sum_of_scores"], 3), number(r["kl"], 3), number(r["loss"], 3), r["healed_tokens"],
        ]
        for r in rows
    ]  # fmt: skip
    first = rows[0]
    stages = ", ".join(
        f"{name} {float(first[f'{name}_s']):.0f} s"
        for name in ("build", "score", "profile", "heal", "evaluate")
        if first[f"{name}_s"]
    )
    head = f"The speed-up as `solve` promises it and as three verbs measure it; the parent's loss is {number(first['parent_loss'], 3)}. "
    head += f"Stages of the first goal: {stages}.\n\n"
    columns = [
        "goal", *names, "tokens/s promised", "by run", "GB predicted", "measured", "sum of scores", "KL", "loss", "healed with tokens",
    ]  # fmt: skip
    return head + table(columns, lines)


def bench(value: dict[str, Any]) -> str:
    lines = []
    for model in ("parent", "child"):
        if model not in value:
            continue
        predicted, measured = value[model]["predicted"], value[model]["measured"]
        lines.append([
            model, measured["batch"], number(predicted["tokens_per_second"], 0), number(measured["tokens_per_second"], 0),
            number(measured["tokens_per_second"] / predicted["tokens_per_second"], 3),
            *(f"{short_time(p)}, {short_time(m)}" for p, m in (
                (predicted[key], measured[key]) for key in ("ttft_seconds", "tpot_seconds")
            )),
            f"{number(predicted['memory_bytes'], 1, '1e-9')}, {number(measured['memory_bytes'], 1, '1e-9')} GB",
        ])  # fmt: skip
    work, precision = value["workload"], value.get("precision") or value["dtype"]  # as earlier versions called it
    head = f"{work['input_len']} tokens in, {work['output_len']} out, {precision}. Pairs are predicted, measured."
    if "speedup" in value:
        speedup = value["speedup"]
        head += f" Over the parent: {number(speedup['predicted'], 2)}x predicted, {number(speedup['measured'], 2)}x measured."
    columns = ["model", "batch", "predicted tokens/s", "measured", "measured / predicted", "TTFT", "TPOT", "memory"]
    return head + "\n\n" + table(columns, lines)


def build_8b(rows: list[Row]) -> str:
    def shown(value: str) -> str:
        return f"{float(value):,.0f}" if float(value) >= 1000 else value

    facts = f"Layers {rows[0]['layers']} in {rows[0]['groups']} groups, {int(rows[0]['tokens']):,} tokens.\n\n"
    lines = ([r["quantity"].replace("_", " "), shown(r["predicted"]), shown(r["measured"])] for r in rows)
    return facts + table(["", "predicted", "measured"], lines)


def build_8b_steps(rows: list[Row]) -> str:
    lines = (
        [
            r["turned_on"],
            f"{int(r['tokens_a_step']):,}",
            milliseconds(r["seconds"], 1),
            f"{int(r['tokens_per_second']):,}",
            r["mfu"],
        ]
        for r in rows
    )
    return table(["turned on as well", "tokens a step", "a step of one layer", "tokens/s, 32 layers", "MFU"], lines)


def build_8b_profile(rows: list[Row]) -> str:
    lines = ([r["turned_on"], r["class"], milliseconds(r["seconds"], 2), percent(r["share"])] for r in rows)
    return table(["turned on as well", "class", "time", "share"], lines)


def profile(rows: list[Row]) -> str:
    return table(
        ["shapes", "dtype", "points", "seconds", "points a minute"],
        ([r["shapes"], r["dtype"], r["points"], r["seconds"], r["points_per_minute"]] for r in rows),
    )


WITH_ENDS = (
    "2026-11-28"  # since then steps of several GPUs have the sums of embedding and head (`bench_fusion_latency.py`)
)


def fusion_latency(rows: list[Row]) -> str:
    fused, lines = ("twos", "fours", "one"), []
    known = [list(dict.fromkeys(row[column] for row in rows)) for column in ("shapes", "ffn_of_attention_free")]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    points = sorted(
        groups(rows, "shapes", "tp", "ffn_of_attention_free", "device"),
        key=lambda point: (known[0].index(point[0]), int(point[1]), devices.index(point[3]), known[1].index(point[2])),
    )
    for shapes, gpus, width, device in points:
        of_card = [r for r in rows if (r["shapes"], r["tp"], r["device"]) == (shapes, gpus, device)]
        own = [r for r in of_card if r["ffn_of_attention_free"] == width]
        parent = [r for r in of_card if r["fusion"] == "parent"]
        of = {way: [r for r in own if r["fusion"] == way] for way in ("unfused", *fused)} | {"parent": parent}
        reduces = ", ".join(of[way][0]["all_reduces_per_token"] for way in ("parent", "unfused", *fused))
        cells = [" / ".join(r["speedup_over_unfused"] for r in of[way]) for way in fused]
        over = " / ".join(number(r["speedup_over_parent"], 2) for r in of["one"])
        steps = " / ".join(milliseconds(r["p50_s"], 2) for r in of["unfused"])
        cards = gpus if len(devices) == 1 else f"{gpus} x {device}"
        lines.append([shapes, cards, width, NONE if gpus == "1" else reduces, steps, *cells, over])
    batches = " / ".join(dict.fromkeys(row["batch"] for row in rows))
    head = (
        f"At batch {batches}, {rows[0]['context']} cached tokens; FFN: width in the attention-free layers. Speed-ups of the median "
        "step: in twos, in fours and all in one over unfused; all in one over the parent, which has attention everywhere."
    )
    if any(row["tp"] != "1" and row["date"] >= WITH_ENDS for row in rows):
        head += f" Steps of several GPUs that were measured since {WITH_ENDS} have the sums of embedding and head too."
    columns = ["shapes", "GPUs", "FFN", "all-reduces: parent, unfused, twos, fours, one", "unfused, ms"]
    return head + "\n\n" + table([*columns, *fused, "one over the parent"], lines)


# ---- quality


def tp_promise(rows: list[Row]) -> str:
    """Measured over promised, by card and number of GPUs."""
    found = []
    for (device, shapes, tp, costs, sums), same in groups(
        rows, "device", "shapes", "tp", "table_of", "all_reduces_of"
    ).items():
        errors = [float(row["measured_over_promised"]) - 1 for row in same]
        mean = sum(map(abs, errors)) / len(errors)
        ends = f"{100 * min(errors):+.1f} to {100 * max(errors):+.1f} %"
        found.append((device, shapes, tp, costs, sums, len(same), percent(mean, 2), ends))
    columns = (
        "measured on",
        "shapes",
        "GPUs",
        "table of",
        "all-reduces of",
        "steps",
        "mean error",
        "measured over promised",
    )
    return table(columns, found)


def seeds(rows: list[Row]) -> str:
    """What was asked and promised, beside the papers."""
    told = (
        "Speed-ups and sizes are promises from measured tables; the papers' are theirs, of other engines and workloads."
    )
    columns = {
        "recipe": "recipe",
        "latency or throughput": "speed",
        "parameters_B": "parameters, 10⁹",
        "paper_parameters_B": "paper's",
        "paper_speed": "paper's speed",
        "parent_memory_GB": "parent, GB a GPU",
        "memory_GB": "child",
        "memory_with_cached_tokens_GB": "with all cached tokens",
        "layers_with_attention": "layers with attention",
        "ffns": "FFNs",
        "fused_runs": "fused runs",
    }
    for row in rows:
        lower = "latency" in row["goal"]
        row["latency or throughput"] = (
            f"{row['latency_x']}x lower latency" if lower else f"{row['throughput_x']}x throughput"
        )
    return told + "\n\n" + table(list(columns.values()), [[row[key] for key in columns] for row in rows])


def stored_logits(rows: list[Row]) -> str:
    first = rows[0]
    before = f"{int(first['tokens']):,} tokens; KL before {number(first['kl_before'], 3)}, the parent's loss {number(first['parent_loss'], 3)}."
    return f"{before}\n\n" + table(
        ["teacher", "bytes a token", "KL", "loss"],
        ([r["way"], r["bytes_per_token"], number(r["kl"], 4), number(r["loss"], 4)] for r in rows),
    )


def fp8(rows: list[Row]) -> str:
    return f"{int(rows[0]['num_tokens']):,} tokens.\n\n" + table(
        ["child", "in fp8", "KL", "±", "loss", "same top token", "MB"],
        (
            [r["child"], r["in_fp8"], number(r["kl"], 4), number(r["kl_stderr"], 4), number(r["lm_loss"], 3),
             percent(r["top1_agreement"]), number(r["bytes"], 1, "1e-6")]
            for r in rows
        ),
    )  # fmt: skip


def precision(rows: list[Row]) -> str:
    names = {"parent": "reference parent", "smol": "SmolLM2-135M"}
    return table(
        ["library", "tokens/s", "memory at most", "precision", "KL", "±", "sum of scores", "attention, FFN in fp8", "cache", "GB"],
        (
            [names[r["library"]], f"{r['speed']}x", percent(r["memory"]), r["precision"].replace("bf16,fp8", "chosen"),
             number(r["kl"], 4), number(r["kl_stderr"], 4), number(r["sum_of_scores"], 4), f"{r['fp8_attention']}, {r['fp8_ffn']}",
             r["cache"], number(r["gigabytes"], 2)]
            for r in rows
        ),
    )  # fmt: skip


def fusion(rows: list[Row]) -> str:
    return f"{int(rows[0]['num_tokens']):,} tokens.\n\n" + table(
        ["child", "runs", "layers", "dependency", "KL", "±", "KL to unfused", "loss", "same top token"],
        (
            [r["child"], r["runs"] or NONE, r["num_layers"], r["dependency"] or NONE, number(r["kl"], 3),
             number(r["kl_stderr"], 3), number(r["kl_to_unfused"], 3), number(r["lm_loss"], 3), percent(r["top1_agreement"])]
            for r in rows
        ),
    )  # fmt: skip


def fusion_aware(rows: list[Row]) -> str:
    return table(
        ["goal", "way", "solved for", "predicted speed-up", "runs", "layers", "KL", "±", "loss"],
        (
            [r["goal"], r["way"], r["solved_for"], f"{r['predicted_speedup']}x", r["runs"] or NONE,
             r["num_layers"], number(r["kl"], 3), number(r["kl_stderr"], 3), number(r["lm_loss"], 3)]
            for r in rows
        ),
    )  # fmt: skip


def fusion_aware_measured(rows: list[Row]) -> str:
    return table(
        ["batch", "goal", "way", "runs", "layers", "predicted", "measured", "over aware's", "measured speed-up", "KL"],
        (
            [r["batch"], r["goal"], r["way"], r["runs"] or NONE, r["num_layers"], f"{milliseconds(r['predicted_s'], 1)} ms",
             f"{milliseconds(r['measured_s'], 1)} ms", r["measured_over_aware"], f"{number(r['measured_speedup'], 2)}x",
             number(r["kl"], 3)]
            for r in rows
        ),
    )  # fmt: skip


def fusion_charge(rows: list[Row]) -> str:
    ratios = [float(r["charge"]) / float(r["kl"]) for r in rows]
    head = f"Charge over KL: {min(ratios):.2f} to {max(ratios):.2f}, {median(ratios):.2f} in the median.\n\n"
    return head + table(
        ["FFN", "beside", "dependency", "charge", "KL", "±"],
        ([r["ffn"], r["beside"], r["dependency"], r["charge"], r["kl"], r["kl_stderr"]] for r in rows),
    )


SHOWN = (0.0, 0.2, 0.5, 1.0)  # of the tokens


def heal(name: str) -> Callable[[list[Row]], str]:
    """KL and loss along every run; runs differ in column `name`."""

    def build(rows: list[Row]) -> str:
        lines = []
        runs = groups(rows, name)
        for (value,), found in runs.items():
            last = int(found[-1]["tokens"])
            at = [min(found, key=lambda r, share=share: abs(int(r["tokens"]) - share * last)) for share in SHOWN]  # type: ignore[misc]
            lines.append([
                value, *(number(r["kl"], 3) for r in at), *(number(r["loss"], 3) for r in at),
                percent(found[-1]["gap_closed"]), f"{int(found[-1]['run_tokens_per_second']):,}",
            ])  # fmt: skip
        first = rows[0]
        marks = [f"{share:.0%}".replace("%", " %") for share in SHOWN]
        head = (
            f"{int(rows[-1]['tokens']):,} tokens, {first['batch_size']} × {first['seq_len']} a step; the parent's loss is "
            f"{number(first['parent_loss'], 3)}. KL and loss after {', '.join(marks[:-1])} and {marks[-1]} of the tokens.\n\n"
        )
        columns = [name, *(f"KL, {m}" for m in marks), *(f"loss, {m}" for m in marks), "gap closed", "tokens/s"]
        return head + table(columns, lines)

    return build


def heal_resume(rows: list[Row]) -> str:
    def gap(one: str, other: str) -> float:
        return max(abs(float(r[one]) - float(r[other])) for r in rows)

    lines = [
        ["two undisturbed runs", f"{gap('loss_1', 'loss_2'):.1e}"],
        ["killed and continued against the one", f"{gap('loss_resumed', 'loss_1'):.1e}"],
        ["against the other", f"{gap('loss_resumed', 'loss_2'):.1e}"],
    ]
    head = f"{len(rows)} steps, killed after step {rows[0]['killed_after_step']}.\n\n"
    return head + table(["largest difference of a step's loss", "nats"], lines)


# ---- serving


def solver(rows: list[Row]) -> str:
    timed = [{**r, "size": r["instance"].split()[0]} for r in rows if r["case"] != "baselines"]
    lines = []
    for (case, size), found in groups(timed, "case", "size").items():
        seconds = [float(r["seconds"]) for r in found]
        status = ", ".join(dict.fromkeys(r["status"] for r in found))
        worst = max(float(r["gap"]) for r in found)
        lines.append(
            [case, size, len(found), status, f"{median(seconds):.2f}", f"{max(seconds):.2f}", percent(worst, 2)]
        )
    simple = [{**r, "rule": r["instance"].split(maxsplit=3)[3]} for r in rows if r["case"] == "baselines"]
    over = []
    for (rule,), found in groups(simple, "rule").items():
        objectives = [float(r["objective"]) for r in found]
        over.append([rule, len(found), f"{min(objectives):.2f} to {max(objectives):.2f}"])
    columns = ["case", "layers × variants", "instances", "status", "median, s", "worst, s", "largest gap"]
    return table(columns, lines) + "\n\n" + table(["rule", "instances", "objective over the optimum"], over)


def baselines(rows: list[Row]) -> str:
    """The random choices as their best one; the sum's ratio over all of them."""
    chosen = [r for r in rows if not r["choice"].startswith("random")]
    chance = [r for r in rows if r["choice"].startswith("random")]
    best = min(chance, key=lambda r: float(r["kl"]))
    chosen.append({**best, "choice": f"best of {len(chance)} random"})
    least = float(chosen[0]["kl"])
    ratios = [float(r["kl"]) / float(r["sum_of_scores"]) for r in rows]
    head = (
        f"{int(rows[0]['num_tokens']):,} tokens. KL over the sum of scores, all {len(rows)} children: "
        f"{min(ratios):.1f} to {max(ratios):.1f}.\n\n"
    )
    return head + table(
        ["choice", "predicted speed-up", "sum of scores", "KL", "±", "KL over the MIP's", "loss"],
        (
            [r["choice"], f"{r['predicted_speedup']}x", number(r["sum_of_scores"], 3), number(r["kl"], 3),
             number(r["kl_stderr"], 3), f"{float(r['kl']) / least:.2f}", number(r["lm_loss"], 3)]
            for r in chosen
        ),
    )  # fmt: skip
