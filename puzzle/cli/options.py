"""Options that several verbs share, and how they print JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from puzzle.base import units
from puzzle.base.errors import UserError
from puzzle.base.files import json_text
from puzzle.base.workload import Workload

PATH = click.Path(path_type=Path)

data = click.option(
    "--data",
    "-d",
    multiple=True,
    metavar="PATH",
    help="Directory, glob or file of text or rows (.jsonl, .ndjson, .json, .parquet), or a datasets name. Repeatable.",
)
text_field = click.option("--text-field", default="text", metavar="NAME", help="Field of rows that holds the text.")
device = click.option("--device", default="auto", metavar="DEVICE", help="auto, cpu or cuda.")
parent = click.option("--parent", metavar="PARENT", help="Where the library's parent is now, if it has moved.")
library = click.option("--library", type=PATH, help="Of an architecture that does not lie in it.")
max_shard = click.option("--max-shard", default="4GiB", metavar="BYTES", help="Largest safetensors file.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
input_len = click.option("--input-len", type=int, default=128, help="Prompt tokens of a request.")
output_len = click.option("--output-len", type=int, default=128, help="Generated tokens of a request.")
priced_input_len = click.option("--input-len", type=int, help="Prompt tokens. Default: what was solved for, else 128.")
priced_output_len = click.option(
    "--output-len", type=int, help="Generated tokens. Default: what was solved for, else 128."
)


def workload(input_len: int | None, output_len: int | None) -> Workload | None:
    """None: neither is given. Raises UserError for one without the other."""
    if input_len is None or output_len is None:
        if input_len is not output_len:
            raise UserError("`input_len` and `output_len` go together: pass both or none")
        return None
    return Workload(input_len=input_len, output_len=output_len)


def numbers(_: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """A callback of options: '1,4,16' -> (1, 4, 16). Raises UserError unless all are positive integers."""
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"`{option.name}` {text}: write positive integers separated by commas, such as 1,4,16")
    return found


def positive(_: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """A callback of options: raises UserError unless the number is above 0, where one is given."""
    if value is not None:
        units.positive(option.name or "", value)
    return value


def num_bytes(_: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """A callback of options: '80GB' -> 80·10⁹. Raises UserError for what is no amount of memory."""
    return None if text is None else units.parse_bytes(text, option.name)


engine_python = click.option("--python", type=PATH, help="Python of the environment that has the engine.")
engine_reader = click.option(
    "--format", "reader", default="hf", metavar="FORMAT", help="What vLLM reads: hf (by the plug-in) or nemotron-nas."
)
memory_limit = click.option(
    "--memory-limit",
    metavar="BYTES",
    callback=num_bytes,
    help="Most GPU memory, or on a CPU most of the whole process's memory, e.g. 80GB.",
)


def held_out(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of a verb that measures children: on which text, and where."""
    sequences = click.option(
        "--sequences", type=int, default=64, help="Held-out sequences that children are measured on."
    )
    for option in (memory_limit, parent, device, text_field, sequences, data):
        command = option(command)
    return command


HELD_OUT = ("data", "parent", "sequences", "text_field", "device", "memory_limit")  # what `held_out` adds
dry_run = click.option("--dry-run", is_flag=True, help="Print passes and memory; measure and write nothing.")


def alone() -> bool:
    """Whether this is the only process: torchrun says how many there are."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def print_facts(facts: Mapping[str, Any], within: str = "") -> None:
    """A line each, sizes as people read them."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            print_facts(value, f"{within}{name}.")
        else:
            text = units.bytes_text(value) if name.endswith("_bytes") else value
            click.echo(f"{within}{name}: {text}", err=True)


def print_json(value: dict[str, Any]) -> None:
    click.echo(json_text(value))


def print_line(value: dict[str, Any], as_json: bool, line: str) -> None:
    """As JSON, or `line` for people."""
    print_json(value) if as_json else click.echo(line, err=True)


def show(make: Callable[[], dict[str, Any]], as_json: bool, table: Callable[[dict[str, Any]], None]) -> None:
    """What `make` gives, as JSON or as `table` prints it; of several processes the first alone looks and prints."""
    if os.environ.get("RANK", "0") == "0":
        print_json(make()) if as_json else table(make())
