"""Options that several verbs share, and how they print JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

DIRECTORY = click.Path(path_type=Path)

data = click.option(
    "--data",
    "-d",
    multiple=True,
    metavar="PATH",
    help="Directory, glob or file of text, .jsonl or .parquet, or a datasets name. Repeatable.",
)
text_field = click.option("--text-field", default="text", help="Field of .jsonl and .parquet rows.")
device = click.option("--device", default="auto", help="auto, cpu or cuda.")
parent = click.option("--parent", help="Where the library's parent is now, if it has moved.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
input_len = click.option("--input-len", type=int, default=128, help="Prompt tokens of a request.")
output_len = click.option("--output-len", type=int, default=128, help="Generated tokens of a request.")


def count(option: str, text: str, least: int = 1) -> int:
    """'1e6', '20M' -> a count, for options that take large numbers."""
    from puzzle.base.units import parse_count

    return parse_count(option, text, least)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """'1,4,16' -> (1, 4, 16). Raises UserError unless all are positive integers."""
    from puzzle.base.errors import UserError

    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"`{option}` {text}: write positive integers separated by commas, such as 1,4,16")
    return found


def positive(option: str, value: float) -> None:
    """Raise UserError unless value > 0."""
    from puzzle.base import units

    units.positive(option, value)


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))
