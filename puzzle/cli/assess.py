"""`puzzle score` and `puzzle evaluate`: how far blocks and whole children are from the parent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.base.errors import UserError
from puzzle.cli import options, tasks
from puzzle.cli.modes import Mode, Verb


@click.command("score")
@click.argument("library", type=options.PATH)
@options.data
@options.parent
@click.option("--sequences", type=int, default=64, help="Held-out sequences.")
@click.option("--seq-len", type=int, help="Tokens of a sequence. Default: as in training.")
@click.option("--joint", is_flag=True, help="Also score every (attention, FFN) pair of a layer.")
@click.option("--fp8", is_flag=True, help="Also score the parent's own blocks in fp8, for `puzzle solve --precision`.")
@click.option(
    "--sub-block-screen",
    type=float,
    metavar="FRACTION",
    help="Leave out this share of all blocks, those with the largest second-order estimate, e.g. 0.3.",
)
@options.memory_limit
@options.dry_run
@options.text_field
@options.device
@options.as_json
def score_command(
    library: Path, data: tuple[str, ...], parent: str | None, dry_run: bool, as_json: bool, **chosen: Any
) -> None:
    """Measure, per block of LIBRARY, the KL divergence when it alone replaces its parent block.

    `build-library` does this too; use this verb to score on more text, or joint pairs. A parent that does not fit into memory is
    read layer by layer. A run that was stopped goes on where it was.

    \b
    Examples:
      puzzle score lib --data /usr/lib/python3 --sequences 256 --joint
      puzzle score lib --data /usr/lib/python3 --sub-block-screen 0.3
      torchrun --nproc-per-node 8 -m puzzle.cli score lib --data corpus.jsonl
    """
    from puzzle.cli.report import library_summary, print_library
    from puzzle.library.score import ScoreOptions, plan_scores, score_library

    if dry_run:
        facts = plan_scores(library, list(data), ScoreOptions(**chosen), parent=parent)
        options.show(lambda: facts, as_json, options.print_facts)
        return
    score_library(library, list(data), ScoreOptions(**chosen), parent=parent)
    options.show(lambda: library_summary(library), as_json, print_library)


MODES = (
    Mode("with `tasks`", lambda p: p["tasks"] is not None, uses=f"{tasks.NAMES} {tasks.SHARED}"),
    Mode("without `tasks`", lambda p: p["tasks"] is None, unused=tasks.NAMES),
    Mode("with `no_speed`", lambda p: p["no_speed"], unused="input_len output_len batch repeats"),
)


@click.command("evaluate", cls=Verb, modes=MODES)
@click.argument("parent")
@click.argument("child", metavar="CHILD|ARCHITECTURE")
@options.library
@options.data
@click.option("--sequences", type=int, default=64, help="Held-out sequences.")
@click.option("--seq-len", type=int, default=1024, help="Tokens of a sequence.")
@options.priced_input_len
@options.priced_output_len
@click.option(
    "--batch",
    metavar="P,C",
    callback=options.numbers,
    help="Batch of parent and child. Default: the child's architecture.json.",
)
@click.option(
    "--repeats", type=int, default=3, help="Timed runs of each; the median counts, and two that agree are enough."
)
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Show how both continue it, sampled. Repeatable."
)
@click.option("--no-speed", is_flag=True, help="Measure divergence and sizes only.")
@tasks.task_options
@options.memory_limit
@options.dry_run
@options.text_field
@options.device
@options.as_json
def evaluate_command(
    parent: str,
    child: str,
    library: Path | None,
    data: tuple[str, ...],
    input_len: int | None,
    output_len: int | None,
    batch: tuple[int, ...] | None,
    no_speed: bool,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Measure PARENT and CHILD side by side: loss, KL, top-1 agreement, tokens/s, bytes, KV cache.

    CHILD is a checkpoint, or what `puzzle solve` wrote, whose blocks then come from its library. Models that do not fit into
    memory together go over the text layer by layer. With --tasks: what both can do, and how they differ document by document.
    --json has the KL of each held-out sequence, so that two children on the same text can be compared in pairs.

    \b
    Examples:
      puzzle evaluate examples/parent child --data /usr/lib/python3 --json
      puzzle evaluate parent child --tasks gsm8k,hellaswag --task-data sets --limit 200
      puzzle evaluate examples/parent lib/solution --data /usr/lib/python3
    """
    given = {name: chosen.pop(name) for name in ("tasks", *tasks.NAMES.split())}
    if given["tasks"] is not None:
        shared = {"device": chosen["device"], "memory_limit": chosen["memory_limit"]}
        tasks.evaluate_command(parent, child, library, dry_run, as_json, **given, **shared)
        return
    from puzzle.base.console import say
    from puzzle.base.workload import Workload
    from puzzle.cli.report import print_evaluation
    from puzzle.export.checkpoint import outdated_code
    from puzzle.library.assemble import open_child
    from puzzle.measure.evaluate import EvaluateOptions, evaluate, plan_evaluation

    if batch is not None and len(batch) > 2:
        raise UserError(f"`batch` {','.join(map(str, batch))}: one for both, or one of the parent and one of the child")
    pair = None if batch is None else (batch[0], batch[-1])
    opened, work = open_child(child, library), options.workload(input_len, output_len)
    if work is None and not no_speed:
        work = opened.solved.workload if opened.solved else Workload(input_len=128, output_len=128)
    if dry_run:
        facts = plan_evaluation(parent, opened, list(data), EvaluateOptions(**chosen))
        options.show(lambda: facts, as_json, options.print_facts)
        return
    result = evaluate(parent, opened, list(data), EvaluateOptions(**chosen), work=work, batches=pair)
    if (hint := outdated_code(Path(child))) is not None:  # measured without that code
        say(f"note: {hint}")
    options.show(result.to_json, as_json, lambda _: print_evaluation(result))
