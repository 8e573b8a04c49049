"""`puzzle export`"""

from __future__ import annotations

from pathlib import Path

import click

from puzzle.cli import options


@click.command("export")
@click.argument("library", type=options.DIRECTORY)
@click.argument("architecture", type=options.DIRECTORY)
@click.option("--out", type=options.DIRECTORY, required=True, metavar="CHILD", help="New directory for the checkpoint.")
@options.parent
@click.option("--max-shard", default="4GiB", show_default=True, help="Largest safetensors file.")
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@options.as_json
def export_command(
    library: Path, architecture: Path, out: Path, parent: str | None, max_shard: str, force: bool, as_json: bool
) -> None:
    """Write the child that ARCHITECTURE (architecture.json or its directory) chooses from LIBRARY.

    The checkpoint loads with AutoModelForCausalLM.from_pretrained(CHILD, trust_remote_code=True).

    \b
    Example:
      puzzle export lib lib/solution --out child
    """
    from puzzle.export.hf import export_child
    from puzzle.hardware import parse_bytes

    export_child(library, architecture, out, parent=parent, force=force, max_shard_bytes=parse_bytes(max_shard))
    options.print_json({"child": str(out)}) if as_json else click.echo(f"wrote {out}", err=True)
