"""Whether a child obeys the format of both modes, and how often it is right in each.

    python examples/post_training/assess.py CHILD held-out.jsonl --out assessed.json

Rows as curriculum.py has them; every question is asked in both modes and answered greedily. Errors are those of the mean.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from curriculum import read_rows
from rewards import COUNT, MODES, Script, in_format, is_right, prompt
from sampling import Child, check_room

SHOWN = 8  # answers that are kept as they are


@click.command(cls=Script)
@click.argument("child")
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--limit", type=COUNT, default=256, show_default=True, help="Questions, the first ones.")
@click.option("--at-once", type=COUNT, default=128, show_default=True)
@click.option("--max-new-tokens", type=COUNT, default=128, show_default=True)
@click.option("--sandbox", help="A command that runs the program on its standard input, for prompts with tests.")
def main(child: str, prompts: Path, out: Path, limit: int, at_once: int, max_new_tokens: int, sandbox: str | None):
    """Ask CHILD the questions of PROMPTS and write what came of it to --out."""
    rows = read_rows(prompts, sandbox, out)[:limit]
    check_room(child, [prompt(row["question"], thinking) for thinking in MODES for row in rows], max_new_tokens)
    asked = Child(child)
    found: dict = {"child": child, "questions": len(rows)}
    for thinking, mode in MODES.items():
        texts = []
        for begin in range(0, len(rows), at_once):
            chats = [prompt(row["question"], thinking) for row in rows[begin : begin + at_once]]
            texts += [text for [text] in asked.answers(chats, max_new_tokens, None)]
        counts = {
            "format": [in_format(text, thinking) for text in texts],
            "accuracy": [is_right(text, row, sandbox) for text, row in zip(texts, rows, strict=True)],
        }
        said = [{**row, "text": text} for row, text in zip(rows[:SHOWN], texts, strict=False)]
        found[mode] = {"first": texts[0], "said": said}
        for name, each in counts.items():
            mean = sum(each) / len(each)
            error = (mean * (1 - mean) / max(len(each) - 1, 1)) ** 0.5
            found[mode] |= {name: round(mean, 4), f"{name}_stderr": round(error, 4)}
            click.echo(f"{mode}: {name} {mean:.3f} ± {error:.3f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
