"""`puzzle fuse`"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from puzzle.cli import options
from puzzle.cli.modes import Mode, Verb


def _runs_are_known(given: Mapping[str, Any]) -> bool:
    """By hand, or as the child was solved for."""
    from puzzle.measure.architecture import architecture_beside

    if given["runs"] is not None:
        return given["runs"] != "auto"
    child = given["child"]
    solved = architecture_beside(child if child.is_dir() else child.parent)
    return solved is not None and bool(solved.fuse)


MODES = (
    Mode(
        "with `dependency_only`",
        lambda p: p["dependency_only"],
        unused="runs norm max_dependency keep_last max_width dependency_file max_shard dry_run force",
    ),
    Mode(
        "with runs that are named or were solved for (`runs` auto chooses others)",
        _runs_are_known,
        unused="max_dependency keep_last max_width",
    ),
    Mode("without `data`", lambda p: not p["data"], unused="sequences seq_len memory_limit text_field device"),
)


@click.command("fuse", cls=Verb, modes=MODES)
@click.argument("child", type=options.PATH, metavar="CHILD|ARCHITECTURE")
@options.library
@options.data
@click.option("--out", type=options.PATH, metavar="DIR", help="New directory; FILE.json with --dependency-only.")
@click.option(
    "--runs",
    metavar="RUNS",
    help="By hand: 3-5,8-11. solved: as CHILD was solved for. auto: chosen by dependency. Default: solved where `puzzle solve --fusion` made CHILD, else auto.",
)
@click.option(
    "--norm",
    type=click.Choice(["own", "last"]),
    default="own",
    help="Each FFN reads through its own norm, or all through the last one's, as the paper has it.",
)
@click.option(
    "--max-dependency",
    type=float,
    default=0.1,
    metavar="D",
    help="Fuse FFNs whose contribution turns by less than this cosine distance.",
)
@click.option("--keep-last/--no-keep-last", default=True, help="Leave the last FFN before an attention alone.")
@click.option("--max-width", metavar="CHANNELS", help="Of a fused FFN: 28672, or 4x the parent's.")
@click.option("--sequences", type=int, callback=options.positive, default=16, help="Held-out sequences.")
@click.option("--seq-len", type=int, callback=options.positive, default=512, help="Tokens of a sequence.")
@click.option(
    "--dependency",
    "dependency_file",
    type=options.PATH,
    metavar="JSON",
    help="A dependency.json of CHILD, in place of --data.",
)
@click.option(
    "--dependency-only", is_flag=True, help="Measure any model, fuse nothing; FFNs too, for `puzzle solve --fusion`."
)
@click.option("--heat-map", type=options.PATH, metavar="PNG", help="Draw the dependency (needs matplotlib).")
@click.option(
    "--parallel-blocks", is_flag=True, help="Also measure whole blocks in parallel (a report: no engine serves it)."
)
@options.max_shard
@click.option("--dry-run", is_flag=True, help="Say what would be fused, write nothing.")
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@options.memory_limit
@options.text_field
@options.device
@options.as_json
def fuse_command(child: Path, as_json: bool, **wanted: Any) -> None:
    """Make one layer of neighbouring layers without attention of CHILD: FFNs side by side, in one wide FFN.

    Fewer sequential steps, the same weights; what changes is that FFNs of a run no longer see each other. Which runs
    bear it is measured on held-out text (--data), or given by hand.

    \b
    Examples:
      puzzle fuse child --data /usr/lib/python3 --out fused
      puzzle fuse child --runs 3-5,8-11 --out fused
      puzzle fuse child --data /usr/lib/python3 --heat-map map.png --parallel-blocks --dry-run
      puzzle fuse parent --data /usr/lib/python3 --dependency-only --out dependency.json
    """
    from puzzle.cli.report import print_fusion
    from puzzle.fuse.verb import FuseOptions, fuse_verb

    done = fuse_verb(child, FuseOptions(**wanted))
    options.print_json({"schema": 1, **done}) if as_json else print_fusion(done)
    for path in done["written"]:
        click.echo(f"wrote {path}", err=True)
