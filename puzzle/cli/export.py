"""`puzzle export`"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from puzzle.base.errors import UserError
from puzzle.base.files import parse_json
from puzzle.base.units import parse_bytes
from puzzle.cli import options
from puzzle.cli.modes import Mode, Verb


def _is_gguf(given: Mapping[str, Any]) -> bool:
    from puzzle.export.engines import pick_format

    return pick_format(given["format"], given["engine"])[0] == "gguf"


MODES = (
    Mode("without `kv_dtype`", lambda p: p["kv_dtype"] is None, unused="data text_field device"),
    Mode("with `format` gguf", _is_gguf, unused="max_shard"),
    Mode(
        "with a file as `out`, which has no card",
        lambda p: _is_gguf(p) and p["out"].suffix == ".gguf",
        unused="measured",
    ),
)


@click.command("export", cls=Verb, modes=MODES)
@click.argument("source", type=options.PATH, metavar="LIBRARY|CHILD")
@click.argument("architecture", type=options.PATH, required=False)
@click.option("--out", type=options.PATH, required=True, metavar="DIR", help="New directory, or FILE.gguf.")
@click.option(
    "--format",
    help="hf (default), nemotron-nas, qwen3-moe, gpt-oss, gguf; of hybrids granitemoehybrid, nemotron-h or nemotron-h-puzzle.",
)
@click.option(
    "--engine", metavar="NAME[==VERSION]", help="Who will serve it: vllm, llama.cpp, sglang, mlx, tensorrt-llm."
)
@click.option(
    "--dtype",
    help="float32, bfloat16, float16, fp8, or for gguf q8_0. Default: as solved with --precision, else the parent's; bfloat16 of fp8.",
)
@click.option("--kv-dtype", help="fp8: with scales for an engine's cache in fp8, calibrated on --data.")
@options.data
@options.text_field
@options.device
@options.parent
@click.option("--licence", help="For the model card. Default: what the parent's card says.")
@click.option("--measured", type=options.PATH, metavar="JSON", help="What `puzzle evaluate --json` printed.")
@options.max_shard
@click.option("--push-to-hub", metavar="REPO", help="Upload to this model of the Hugging Face hub too.")
@click.option("--force", is_flag=True, help="Replace what is in --out.")
@options.as_json
def export_command(
    source: Path,
    architecture: Path | None,
    out: Path,
    parent: str | None,
    data: tuple[str, ...],
    measured: Path | None,
    max_shard: str,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Write the child that ARCHITECTURE (architecture.json or its directory) chooses from LIBRARY.

    Or write a CHILD that is already a Hugging Face checkpoint in another format. With --engine the child is rewritten,
    exactly, where the engine cannot take a shape, and what that costs is printed.

    \b
    Examples:
      puzzle export lib lib/solution --out child                         AutoModelForCausalLM, trust_remote_code=True
      puzzle export lib lib/solution --engine vllm --out child-vllm      vllm serve child-vllm --trust-remote-code
      puzzle export child --engine vllm --dtype fp8 --kv-dtype fp8 --data corpus --out child-fp8
      puzzle export child --engine vllm==0.26 --out child-026            for a vLLM that gets mixed KV heads wrong
      puzzle export child --engine llama.cpp --dtype q8_0 --out child.gguf
    """
    from puzzle.export.write import export, open_source

    try:
        evaluation = None if measured is None else parse_json(measured.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"`measured` {measured} cannot be read ({error}): save what `puzzle evaluate --json` prints"
        ) from error
    done = export(
        open_source(source, architecture, parent),
        out,
        data=list(data),
        measured=evaluation,
        max_shard_bytes=parse_bytes(max_shard, "max_shard"),
        **chosen,
    )
    told = {"child": str(out)} | {name: value for name, value in asdict(done).items() if name != "out"}
    options.print_line(told, as_json, f"wrote {out}")
