"""`puzzle score` and `puzzle evaluate`: how far blocks and whole children are from the parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.cli import options


@click.command("score")
@click.argument("library", type=options.PATH)
@options.data
@options.parent
@click.option("--sequences", type=int, default=64, help="Held-out sequences.")
@click.option("--joint", is_flag=True, help="Also score every (attention, FFN) pair of a layer.")
@options.memory_limit
@options.text_field
@options.device
@options.as_json
def score_command(library: Path, data: tuple[str, ...], parent: str | None, as_json: bool, **chosen: Any) -> None:
    """Measure, per block of LIBRARY, the KL divergence when it alone replaces its parent block.

    `build-library` does this too; use this verb to score on more text, or joint pairs.

    \b
    Example:
      puzzle score lib --data /usr/lib/python3.11 --sequences 256 --joint
    """
    from puzzle.cli.report import library_summary, print_library
    from puzzle.library.score import ScoreOptions, score_library

    score_library(library, list(data), ScoreOptions(**chosen), parent=parent)
    summary = library_summary(library)
    options.print_json(summary) if as_json else print_library(summary)


@click.command("evaluate")
@click.argument("parent")
@click.argument("child")
@options.data
@click.option("--sequences", type=int, default=64, help="Held-out sequences.")
@click.option("--seq-len", type=int, default=1024)
@options.input_len
@options.output_len
@click.option(
    "--batch",
    metavar="P,C",
    callback=options.numbers,
    help="Batch of parent and child (default: the child's architecture.json).",
)
@click.option("--repeats", type=int, default=3, help="Timed runs of each; the median counts.")
@click.option("--no-speed", is_flag=True, help="Measure divergence and sizes only.")
@options.text_field
@options.device
@options.as_json
def evaluate_command(
    parent: str,
    child: str,
    data: tuple[str, ...],
    input_len: int,
    output_len: int,
    batch: tuple[int, ...] | None,
    no_speed: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Measure PARENT and CHILD side by side: loss, KL, top-1 agreement, tokens/s, bytes, KV cache.

    \b
    Example:
      puzzle evaluate examples/parent child --data /usr/lib/python3.11 --json
    """
    from puzzle.base.console import console
    from puzzle.base.workload import Workload
    from puzzle.cli.report import print_evaluation
    from puzzle.export.checkpoint import outdated_code
    from puzzle.measure.evaluate import EvaluateOptions, evaluate

    pair = None if batch is None else (batch[0], batch[-1])
    work = None if no_speed else Workload(input_len=input_len, output_len=output_len)
    result = evaluate(parent, child, list(data), EvaluateOptions(**chosen), work=work, batches=pair)
    if (hint := outdated_code(Path(child))) is not None:  # measured without that code
        console.print(f"note: {hint}", markup=False, soft_wrap=True)
    options.print_json(result.to_json()) if as_json else print_evaluation(result)
