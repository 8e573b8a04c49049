"""How hard each prompt is for a child, by sampling, and batches that go from easy to hard.

    python examples/post_training/curriculum.py CHILD prompts.jsonl --out rated.jsonl --samples 8
    python examples/post_training/grpo.py CHILD rated.jsonl --out rl

prompts.jsonl has a row {"question": …, "answer": …} or {"question": …, "tests": …} per line; rated.jsonl the same with `pass_rate`, in
the mode with thinking. Typed again, it goes on where it was stopped. As in Llama-Nemotron (arXiv 2505.00949): prompts that are
mostly solved are dropped, and the pass rates of a batch are drawn from a Gaussian whose mean falls from batch to batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from puzzle.base.errors import UserError
from puzzle.base.files import json_text, write_text
from puzzle.parents.opened import open_model
from rewards import COUNT, SEED, Script, check_same, check_sandbox, is_right, prompt, read_lines
from sampling import Child, check_room


def read_rows(path: Path, sandbox: str | None = None, out: Path | None = None) -> list[dict[str, Any]]:
    """Raises UserError for a row without a question, or without an answer to check, and as `read_lines` and `check_sandbox` do."""
    rows = read_lines(path, out)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("question"), str) or (row.get("answer") is None and not row.get("tests")):
            raise UserError(f"{path} line {number}: a prompt has a `question`, and an `answer` or `tests`")
    check_sandbox(rows, sandbox)
    return rows


def by_difficulty(
    rates: list[float],
    batch_size: int,
    num_batches: int,
    *,
    easiest: float = 0.75,
    hardest: float = 0.0,
    width: float = 0.15,
    seed: int = 0,
) -> list[list[int]]:
    """Prompts of each batch. rates: how often each is solved; those above `easiest` or below `hardest` are dropped. Each batch's are
    drawn, none twice until all were, from a Gaussian of `width` over the rates, whose mean goes from the easiest that is left to the
    hardest."""
    kept = np.array([index for index, rate in enumerate(rates) if hardest <= rate <= easiest])
    if not len(kept):
        if min(rates) > easiest:
            raise UserError(f"all {len(rates)} prompts are solved more often than {easiest:g}: give harder ones")
        raise UserError(
            f"none of {len(rates)} prompts is solved at a rate of {hardest:g} to {easiest:g}: ask for others"
        )
    found, left = np.array([rates[index] for index in kept]), np.ones(len(kept), dtype=bool)
    draw, batches = np.random.default_rng(seed), []
    for mean in np.linspace(found.max(), found.min(), num_batches):
        batch: list[int] = []
        while len(batch) < batch_size:
            left |= not left.any()
            weights = np.exp(-0.5 * ((found - mean) / width) ** 2) * left + 1e-12 * left
            count = min(batch_size - len(batch), int(left.sum()))
            picked = draw.choice(len(kept), count, replace=False, p=weights / weights.sum())
            left[picked] = False
            batch += kept[picked].tolist()
        batches.append(batch)
    return batches


@click.command(cls=Script)
@click.argument("child")
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option(
    "--samples",
    type=COUNT,
    default=8,
    show_default=True,
    help="Answers to a prompt, drawn at temperature 1 with thinking.",
)
@click.option("--at-once", type=COUNT, default=32, show_default=True, help="Prompts.")
@click.option("--max-new-tokens", type=COUNT, default=1024, show_default=True)
@click.option("--sandbox", help="A command that runs the program on its standard input, for prompts with tests.")
@click.option("--seed", type=SEED, default=0)
def main(
    child: str,
    prompts: Path,
    out: Path,
    samples: int,
    at_once: int,
    max_new_tokens: int,
    sandbox: str | None,
    seed: int,
):
    """Write PROMPTS to --out with the share of CHILD's answers that are right."""
    rows = read_rows(prompts, sandbox, out)
    chats = [prompt(row["question"], True) for row in rows]
    check_room(child, chats, max_new_tokens)
    settings = {"samples": samples, "at_once": at_once, "max_new_tokens": max_new_tokens, "seed": seed}
    asked_for, place = {"child": open_model(child).fingerprint(), **settings}, out.with_suffix(".asked.json")
    written = out.read_bytes() if out.is_file() else b""
    whole = written[: written.rfind(b"\n") + 1]  # a kill may have cut the last row off
    if whole:
        check_same(place, asked_for, str(out))
        if whole != written:
            out.write_bytes(whole)
    else:
        write_text(place, json_text(asked_for) + "\n")
    done = read_rows(out, sandbox) if whole else []
    if [row["question"] for row in done] != [row["question"] for row in rows[: len(done)]]:
        raise UserError(f"`out` {out} holds other prompts than {prompts}: give another, or remove it")
    asked = Child(child)
    with open(out, "a" if whole else "w", encoding="utf-8") as handle:
        for begin in range(len(done) // at_once * at_once, len(rows), at_once):
            batch = rows[begin : begin + at_once]
            torch.manual_seed(seed + begin)
            drawn = asked.answers(chats[begin : begin + at_once], max_new_tokens, samples)
            for number, (row, texts) in enumerate(zip(batch, drawn, strict=True), begin):
                row["pass_rate"] = sum(is_right(text, row, sandbox) for text in texts) / samples
                if number >= len(done):  # a batch that was cut off is drawn again, with the same numbers
                    handle.write(json.dumps(row) + "\n")
            handle.flush()
    rates = [row["pass_rate"] for row in [*done, *rows[len(done) :]]]
    click.echo(
        f"{len(rates)} prompts, solved {np.mean(rates):.1%} of the time: {np.histogram(rates, 5, (0, 1))[0]} by fifths"
    )


if __name__ == "__main__":
    main()
