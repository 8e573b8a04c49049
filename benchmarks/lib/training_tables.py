"""Tables of docs/results.md about what follows the healing, and other ways to heal. As in `result_tables.py`, of rows as text."""

from __future__ import annotations

from result_tables import NONE, Row, groups, number, percent, table

SPAN = 10  # steps of a curve that are one line


def post_training(rows: list[Row]) -> str:
    """A line per child, its two modes side by side."""
    lines = []
    for (child,), modes in groups(rows, "child").items():
        shown = [f"{percent(m[k])} ± {percent(m[f'{k}_stderr'])}" for m in modes for k in ("format", "accuracy")]
        first = modes[0]
        seconds = number(first["train_seconds"], 0) if first["train_seconds"] else NONE
        lines.append([child, first["steps"] if first["steps"] != "0" else NONE, seconds, *shown])
    columns = [f"{what}, {row['thinking']}" for row in rows[:2] for what in ("format", "right")]
    head = f"{rows[0]['questions']} held-out questions, greedy answers, in the mode with thinking (on) and without (off).\n\n"
    return head + table(["child", "steps", "training, s", *columns], lines)


def post_training_curves(rows: list[Row]) -> str:
    """Means over SPAN steps."""

    def mean(some: list[Row], column: str, digits: int) -> str:
        values = [float(row[column]) for row in some if row[column]]
        return number(sum(values) / len(values), digits) if values else NONE

    digits = {"loss": 3, "accuracy": 3, "format": 3, "answer_tokens": 1, "kl": 4, "step_seconds": 2}
    lines = []
    for (child,), steps in groups(rows, "child").items():
        for begin in range(0, len(steps), SPAN):
            some = steps[begin : begin + SPAN]
            lines.append(
                [child, f"{some[0]['step']} to {some[-1]['step']}", *(mean(some, c, d) for c, d in digits.items())]
            )
    head = "Means over the steps of a line: the loss, and in GRPO the rewards of what was sampled, its tokens, KL to the child of SFT.\n\n"
    columns = ["child", "steps", "loss", "right", "format", "tokens an answer", "KL", "seconds a step"]
    return head + table(columns, lines)


def other_tokenizer(rows: list[Row]) -> str:
    first = rows[0]
    head = (
        f"{int(first['tokens']):,} of the child's tokens, {first['words']} words; held-out loss in nats per byte: "
        f"{number(first['nats_per_byte_before'], 4)} before, the teacher's {number(first['nats_per_byte_teacher'], 4)}.\n\n"
    )
    lines = [
        [
            r["way"],
            number(r["nats_per_byte"], 4),
            percent(r["tokens_aligned"]) if r["tokens_aligned"] else NONE,
            r["words_in_both"] or NONE,
            number(r["seconds"], 1),
        ]
        for r in rows
    ]
    return head + table(["learnt from", "nats per byte", "tokens aligned", "words in both", "seconds"], lines)


def grow(rows: list[Row]) -> str:
    first = rows[0]
    trained = max(rows, key=lambda row: int(row["tokens"]))
    head = (
        f"{int(trained['tokens']):,} tokens written by {first['writer']}; {first['experts']} experts, {first['top_k']} of a token; logits of "
        f"parent and grown model differ by {first['logits_apart']} before training.\n\n"
    )
    lines = [
        [
            r["way"],
            r["lr"] or NONE,
            number(r["new_loss"], 4),
            number(r["old_loss"], 4),
            number(r["old_kl"], 4),
            number(r["active_parameters"], 1, "1e-6"),
            r["busiest_expert"] or NONE,
            number(r["seconds"], 1) if r["seconds"] else NONE,
        ]
        for r in rows
    ]
    columns = [
        "trained",
        "learning rate",
        "loss, new",
        "loss, old",
        "KL, old",
        "parameters a token, M",
        "busiest expert",
    ]
    return head + table([*columns, "seconds"], lines)


def long_heal(rows: list[Row]) -> str:
    lines = []
    for r in rows:
        promised = float(r["promised_bytes"])
        lines.append([
            r["parent"], f"{int(r['seq_len']):,}", r["batch_size"],
            *(number(r[f"{k}_bytes"], 2, "1e-9") if r[f"{k}_bytes"] else NONE for k in ("promised", "measured", "alive")),
            number(float(r["measured_bytes"]) / promised, 3),
            *(number(r[f"{k}_tokens_per_second"], 0) for k in ("promised", "measured")), number(r["loss_after"], 3),
        ])  # fmt: skip
    columns = ["parent", "tokens", "sequences a step", "planned, GB", "held", "given out", "held over planned"]
    return table([*columns, "tokens/s, planned", "measured", "loss after"], lines)
