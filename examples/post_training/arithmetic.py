"""A small world in which all of the post-training can be tried: sums and products with exact answers, and their solutions.

    python examples/post_training/arithmetic.py --out arithmetic
    python examples/post_training/sft.py arithmetic/stages.yaml --child healed --out sft

OUT/reasoning.jsonl has chats whose answers work the result out digit by digit in <think>…</think>, OUT/direct.jsonl others that give
it at once, OUT/stages.yaml and OUT/both.yaml the stage of sft.py on both; OUT/prompts.jsonl has further questions for curriculum.py and grpo.py,
OUT/held-out.jsonl those for assess.py. No question is in two of the files. One seed, the same files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import click
import yaml

from puzzle.base.errors import UserError
from puzzle.base.units import parse_count
from rewards import COUNT, SEED, Script

SIGNS = {"+": "plus", "-": "minus", "*": "times"}
PHRASES = ("What is {a} {sign} {b}?", "Compute {a} {sign} {b}.", "{a} {word} {b} is how much?")
CHATS = 0.6  # of the questions; prompts get half of the rest and more, held-out the last of it


def worked(a: int, sign: str, b: int) -> tuple[str, int]:
    """How one gets there, a line a step, and the result. b: below 10 for a product."""
    if sign == "*":
        parts = [(int(digit) * 10**place, place) for place, digit in enumerate(reversed(str(a))) if digit != "0"] or [
            (0, 0)
        ]
        lines = [f"{part} * {b} = {part * b}" for part, _ in parts]
        total, sums = 0, []
        for part, _ in parts:
            if total:
                sums.append(f"{total} + {part * b} = {total + part * b}")
            total += part * b
        return "\n".join(lines + sums), a * b
    tens = b // 10 * 10
    middle = a + tens if sign == "+" else a - tens
    steps = [f"{a} {sign} {tens} = {middle}"] if tens else []
    result = middle + b % 10 if sign == "+" else middle - b % 10
    return "\n".join([*steps, f"{middle} {sign} {b % 10} = {result}"]), result


def questions(count: int, largest: int, draw: random.Random) -> list[tuple[int, str, int]]:
    """Different ones, small and large alike often."""
    found: dict[tuple[int, str, int], None] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        sign, most = draw.choice(list(SIGNS)), 10 ** draw.randint(1, len(str(largest)))
        a, b = draw.randrange(min(most, largest + 1)), draw.randrange(10 if sign == "*" else min(most, largest + 1))
        found[(max(a, b), sign, min(a, b)) if sign == "-" else (a, sign, b)] = None
    if len(found) < count:
        raise UserError(f"`count` {count}: numbers up to {largest} make fewer different questions; raise `largest`")
    return list(found)


def asked(question: tuple[int, str, int], draw: random.Random) -> str:
    a, sign, b = question
    return draw.choice(PHRASES).format(a=a, b=b, sign=sign, word=SIGNS[sign])


@click.command(cls=Script)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--count", type=click.IntRange(min=20), default=12_000, show_default=True, help="Questions in all.")
@click.option("--largest", type=COUNT, default=999, show_default=True, help="Number in a question.")
@click.option("--tokens", default="2M", show_default=True, help="Of the stage of fine-tuning.")
@click.option("--seed", type=SEED, default=0)
def main(out: Path, count: int, largest: int, tokens: str, seed: int) -> None:
    """Write all files to --out."""
    parse_count("tokens", tokens)
    draw = random.Random(seed)
    rows: dict[str, list[dict]] = {name: [] for name in ("reasoning", "direct", "prompts", "held-out")}
    for number, question in enumerate(questions(count, largest, draw)):
        text, (way, result) = asked(question, draw), worked(*question)
        if number >= CHATS * count:
            name = "prompts" if number < 0.95 * count else "held-out"
            rows[name].append({"question": text, "answer": str(result)})
            continue
        name = ("reasoning", "direct")[number % 2]
        thought = f"<think>\n{way}\n</think>\n\n" if name == "reasoning" else ""
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": f"{thought}\\boxed{{{result}}}"}]
        rows[name].append({"messages": said})
    out.mkdir(parents=True, exist_ok=True)
    for name, each in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in each)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    sources = [
        {"path": f"{n}.jsonl", "weight": w, "messages": "messages"} for n, w in (("reasoning", 0.7), ("direct", 0.3))
    ]
    stage = {"name": "both", "blend": "both.yaml", "tokens": tokens, "max_length": 1024, "batch_size": 16, "lr": 1e-4}
    for name, value in {"both": {"sources": sources}, "stages": {"stages": [stage]}}.items():
        (out / f"{name}.yaml").write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    click.echo(", ".join(f"{name} {len(each)}" for name, each in rows.items()))


if __name__ == "__main__":
    main()
