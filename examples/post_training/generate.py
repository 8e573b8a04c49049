"""A teacher, of any tokenizer, writes what a child then learns as text: distillation by sequences.

    python examples/post_training/generate.py TEACHER prompts.jsonl --out chats.jsonl --max-new-tokens 4096 --temperature 0.6
    puzzle heal child --data-blend chats.yaml --kl-weight 0 --cosine-weight 0 --lm-weight 1 --out healed

prompts.jsonl has a row per line: {"question": …}, {"messages": [{role, content}, …]} that ends with the user, or {"text": …} to go on from; with
an `answer` or `tests`, only solutions that are right are kept. chats.jsonl has {"messages": …} (a blend's `messages: messages, loss: assistant`)
or {"text": …}. Answers that came to no end, and prompts that are too long, are left out and counted. Typed again, it goes on where it was
stopped, from OUT's .answers.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from puzzle.base.device import pick_device
from puzzle.base.errors import UserError
from puzzle.base.files import write_text
from puzzle.measure.measurable import of_checkpoint
from puzzle.runtime.open import pick_precision
from puzzle.tasks.model import Model
from puzzle.tasks.request import Answers, Request
from rewards import COUNT, Script, check_sandbox, is_right, read_lines


def read_prompts(path: Path, system: str | None, out: Path) -> list[dict[str, Any]]:
    """Rows with `text`, or with `messages` that end with the user. Raises UserError for any other row."""
    first = [] if system is None else [{"role": "system", "content": system}]
    rows = read_lines(path, out)
    for number, row in enumerate(rows, 1):
        if "question" in row:
            row["messages"] = [{"role": "user", "content": row["question"]}]
        messages = row.get("messages")
        chat = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
        )
        if chat and messages and messages[-1].get("role") == "user":
            row["messages"] = first + messages
        elif messages or not isinstance(row.get("text"), str) or not row["text"]:
            raise UserError(
                f"{path} line {number}: a prompt has a `question`, `messages` that end with the user, or a `text`"
            )
    return rows


@click.command(cls=Script)
@click.argument("teacher")
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--samples", type=COUNT, default=1, show_default=True, help="Answers to each prompt.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.6, show_default=True, help="0: greedy.")
@click.option("--max-new-tokens", type=COUNT, default=1024, show_default=True)
@click.option("--system", help="A system prompt before every chat.")
@click.option("--sandbox", help="A command that runs the program on its standard input, for prompts with tests.")
@click.option("--device", default="auto", show_default=True)
def main(
    teacher: str, prompts: Path, out: Path, samples: int, temperature: float, system: str | None, **o: Any
) -> None:
    """Let TEACHER answer PROMPTS, and write what it says to --out."""
    if samples > 1 and temperature == 0:
        raise UserError(f"`samples` {samples} are all alike at `temperature` 0: give one, such as 0.6")
    rows, device = read_prompts(prompts, system, out), pick_device(o["device"])
    check_sandbox(rows, o["sandbox"])
    answers = Answers(out.with_suffix(".answers.jsonl"))
    model = Model(
        name="teacher", opened=of_checkpoint(teacher), device=device, precision=pick_precision(device), answers=answers
    )
    asked = []
    for row in rows:
        context = model.chat(row["messages"]) if "messages" in row else row["text"]
        for number in range(samples):
            whole = {"thinking": None} if "messages" in row else {}
            given = {"max_tokens": o["max_new_tokens"], "temperature": temperature, "sample": number}
            asked.append((row, Request(context=context, **given, **whole)))
    kept, lost = [], {"too long": 0, "without an end": 0, "wrong": 0}
    for (row, request), said in zip(asked, model.answer([request for _, request in asked]), strict=True):
        opened = "<think>\n" if str(request.context).rstrip().endswith("<think>") else ""  # by the template itself
        if request.key(model.key) in model.cut:
            lost["too long"] += 1
        elif not said.strip():
            lost["without an end"] += 1
        elif (row.get("answer") is not None or row.get("tests")) and not is_right(said, row, o["sandbox"]):
            lost["wrong"] += 1
        elif "messages" in row:
            kept.append({"messages": [*row["messages"], {"role": "assistant", "content": opened + said}]})
        else:
            kept.append({"text": row["text"] + said})
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    told = "".join(f", {count} {why}" for why, count in lost.items() if count)
    click.echo(f"{len(kept)} of {len(asked)} answers to {len(rows)} prompts kept{told}")


if __name__ == "__main__":
    main()
