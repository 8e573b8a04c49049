"""`puzzle serve-check`"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from puzzle.cli import options


@click.command("serve-check")
@click.argument("export", type=options.PATH)
@click.option("--engine", required=True, help="hf, vllm, llama.cpp or mlx.")
@click.option("--python", type=options.PATH, help="Python of the environment that has the engine.")
@click.option("--reference", type=options.PATH, help="The child's --format hf export. Default: EXPORT itself.")
@click.option("--tokens", type=int, callback=options.positive, default=64, help="Greedy tokens to compare.")
@click.option("--threads", type=int, callback=options.positive, default=2, help="CPU threads of the engine.")
@options.as_json
def serve_check_command(
    export: Path, engine: str, python: Path | None, reference: Path | None, tokens: int, threads: int, as_json: bool
) -> None:
    """Load EXPORT (a directory or .gguf file) in an engine and compare log-probabilities and greedy tokens with ours.

    vLLM gets many prompts at once too; on a GPU these alone, of 17 to 3,000 tokens, in bf16: its mean |Δ log p| to our float32 may
    be 1.2 times that of our own bf16, with experts the largest of 8 roundings of it.

    Exit code 0: equal; 1: different, or the engine fails on it; 2: bad input, or the engine is not installed.

    \b
    Examples:
      puzzle serve-check child --engine hf
      puzzle serve-check child --engine vllm --python .engines/vllm/bin/python
    """
    from puzzle.serving.check import EngineFailed, serve_check

    try:
        check = serve_check(export, engine, python=python, reference=reference, num_tokens=tokens, threads=threads)
    except EngineFailed as error:
        options.print_json({"equal": False, "error": str(error)}) if as_json else click.echo(f"DIFFERENT: {error}")
        sys.exit(1)
    options.print_json(check.as_dict()) if as_json else click.echo(check.verdict)
    sys.exit(0 if check.equal else 1)
