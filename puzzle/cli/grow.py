"""`puzzle grow`"""

from __future__ import annotations

from typing import Any

import click

from puzzle.cli import options


@click.command("grow")
@click.argument("child", metavar="CHILD")
@click.option("--out", type=options.PATH, required=True, metavar="DIR", help="New directory.")
@click.option("--experts", type=int, required=True, metavar="N", help="New experts beside every FFN.")
@click.option("--top-k", type=int, default=1, metavar="K", help="New experts that a token has.")
@click.option("--width", type=int, metavar="N", help="Channels of a new expert. Default: as many as the FFN has.")
@click.option("--layers", metavar="RANGES", help="Whose FFNs grow, e.g. 0-3,7. Default: all that can.")
@click.option("--seed", type=int, default=0, help="Draws routers, and channels that narrower experts start from.")
@options.max_shard
@click.option("--dry-run", is_flag=True, help="Say what it would be, in parameters and bytes; write nothing.")
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@options.as_json
def grow_command(child: str, as_json: bool, **wanted: Any) -> None:
    """Put new experts beside the FFNs of CHILD, any parent or child, to learn from another model's text.

    The FFN stays, for every token; a router adds the best of N experts, which start with a last matrix of zeros: the logits
    are the same. `heal --old-lr 0` then trains the new alone, `--old-lr 0.1` the old slowly, without it both alike.

    \b
    Examples:
      puzzle grow examples/parent --experts 4 --out grown
      puzzle grow child --experts 8 --top-k 2 --width 352 --layers 8-15 --out grown
      puzzle heal grown --data-blend solutions.yaml --old-lr 0 --lm-weight 1 --kl-weight 0 --cosine-weight 0 --out taught
    """
    from puzzle.cli.report import print_grown
    from puzzle.grow.verb import GrowOptions, grow_verb

    done = grow_verb(child, GrowOptions(**wanted))
    options.print_json({"schema": 1, **done}) if as_json else print_grown(done)
    if not done["dry_run"]:
        click.echo(f"wrote {wanted['out']}", err=True)
