"""`puzzle slice`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.cli import options


@click.command("slice")
@click.argument("source", metavar="PARENT")
@options.data
@click.option("--out", type=options.PATH, required=True, metavar="DIR", help="New directory.")
@click.option("--hidden", type=int, metavar="N", help="Hidden channels that are left, of all layers.")
@click.option("--depth", type=int, metavar="N", help="Layers that are left, whole ones (blocks, of Nemotron-H).")
@click.option("--mamba-heads", type=int, metavar="N", help="Heads that every Mamba-2 keeps.")
@click.option("--mamba-head-dim", type=int, metavar="N", help="Channels that every head of Mamba-2 keeps.")
@click.option("--calibration-sequences", type=int, default=64, help="That order channels, layers and heads.")
@click.option("--score-sequences", type=int, default=64, help="Held-out ones, that measure the result.")
@click.option("--seq-len", type=int, default=1024, help="Tokens of a sequence.")
@options.max_shard
@click.option(
    "--dry-run", is_flag=True, help="Say what it would be, in parameters and bytes; measure and write nothing."
)
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@options.memory_limit
@options.text_field
@options.device
@options.as_json
def slice_command(source: str, data: tuple[str, ...], out: Path, as_json: bool, **wanted: Any) -> None:
    """Write PARENT with fewer hidden channels, fewer layers or a smaller Mamba-2, alike in all layers: a parent of its own.

    What is left is chosen by activations on --data: channels by what the norms give of them, layers by how far they turn the
    stream, heads by what they contribute. By itself this is Minitron's pruning. With a library of its own under LIB/points it
    is a global point that `puzzle solve LIB --hidden N --depth N` chooses among.

    \b
    Examples:
      puzzle slice examples/parent --hidden 192 --depth 14 --data /usr/lib/python3 --out sliced
      puzzle slice nvidia/NVIDIA-Nemotron-Nano-9B-v2 --hidden 4352 --depth 48 --mamba-heads 120 --data corpus --out 7b
      puzzle slice parent --hidden 448 --data corpus --out lib/points/h448/parent
      puzzle build-library lib/points/h448/parent --data corpus --out lib/points/h448
    """
    from puzzle.cli.report import print_sliced
    from puzzle.slice.verb import SliceOptions, slice_verb

    done = slice_verb(source, SliceOptions(data=data, out=out, **wanted))
    options.print_json({"schema": 1, **done}) if as_json else print_sliced(done)
    if not done["dry_run"]:
        click.echo(f"wrote {out}", err=True)
