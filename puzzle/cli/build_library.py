"""`puzzle build-library`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.base.errors import renaming
from puzzle.base.units import parse_count
from puzzle.cli import options
from puzzle.cli.modes import Mode, Verb

MODES = (
    Mode("with `no_score`", lambda p: not p["score"], unused="score_sequences joint"),
    Mode(
        "with `inputs_from`",
        lambda p: p["inputs_from"] is not None,
        unused="origin attention ffn calibration_sequences nested group_size",
    ),
    Mode("without `inputs_from`", lambda p: p["inputs_from"] is None, unused="mix"),
)


@click.command("build-library", cls=Verb, modes=MODES)
@click.argument("source", metavar="PARENT")
@options.data
@click.option("--out", type=options.PATH, required=True, metavar="LIB", help="Library directory; new or to continue.")
@click.option(
    "--origin", metavar="MODEL", help="What PARENT, a healed child, was made of: names, costs and goals are of it."
)
@click.option(
    "--inputs-from", type=options.PATH, metavar="ARCHITECTURE", help="Its blocks learn again, on what the child gives."
)
@click.option("--mix", type=float, default=0.5, help="Share of a batch that is the child's then.")
@click.option(
    "--attention",
    metavar="NAMES",
    help="e.g. kv2,kv1,linear,linear-64,none,window-128. Default: the usual ones of each layer.",
)
@click.option(
    "--ffn",
    metavar="NAMES",
    help="e.g. 0.75,0.5,0.5-obs,0.25,0.1,linear,linear-64,none; of a mixture of experts experts=64,topk=4,experts=0.5-width=0.5,dense=1.0. Default: the usual ones of each layer.",
)
@click.option("--layers", metavar="RANGES", help="Only these layers, e.g. 0-3,7. Default: all.")
@click.option("--tokens", default="1M", metavar="COUNT", help="Training tokens, e.g. 20M; 0 only initialises.")
@click.option("--seq-len", type=int, default=1024, help="Tokens of a sequence.")
@click.option("--batch-size", type=int, default=8, help="Sequences a step.")
@click.option("--lr", type=float, default=3e-3, help="Peak learning rate (docs/lessons.md has the sweep).")
@click.option("--seed", type=int, default=0, help="Orders the data; blocks' seeds depend on them alone.")
@click.option("--calibration-sequences", type=int, default=64, help="For initialisation.")
@click.option("--validation-sequences", type=int, default=16, help="Held out, for the losses reported.")
@click.option("--nested", is_flag=True, help="Train a layer's narrower FFNs as the first channels of one.")
@click.option("--group-size", type=int, help="Layers trained together. Default: as many as fit.")
@options.memory_limit
@click.option("--score/--no-score", default=True, help="Score the blocks after training.")
@click.option(
    "--score-sequences", type=int, callback=options.positive, default=64, help="Held-out sequences for the scores."
)
@click.option("--joint", is_flag=True, help="Also score every (attention, FFN) pair of a layer.")
@click.option("--dry-run", is_flag=True, help="Print groups, memory, disk, FLOPs and time; write nothing.")
@options.text_field
@options.device
@options.as_json
def build_library_command(
    source: str,
    data: tuple[str, ...],
    out: Path,
    tokens: str,
    memory_limit: int | None,
    score: bool,
    score_sequences: int,
    joint: bool,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Train alternatives of every layer's attention and FFN against PARENT, and score them.

    PARENT is a Hugging Face directory or hub id (llama, qwen3, gpt_oss, ...). Running again with the same --out
    continues where a run was stopped, and trains only what is new.

    \b
    Only where --attention names them:
      mamba2-64x80-g8-s128    in place of attention Mamba-2: 64 heads of 80 channels, 8 groups, a state of 128
      gdn                     in place of attention Gated DeltaNet, with the attention's heads; gdn-nogate without a gate
      gdn-16x128-32x128       the same with 16 key and 32 value heads of 128 channels
      dim64                   Mamba-2 with 64 channels of every head; heads64-dim64: and with 64 heads

    \b
    A mixture of experts takes these, joined by '-', as counts or as fractions of its own (with a point):
      experts=64    the experts that add most: router's weight times norm of the output (REAP)
      frequent=64   those that most tokens have, merged=64 the first with the others merged into them
      topk=4        experts of a token
      width=0.5     channels of an expert, shared=0.5 of the shared one
      dense=1.0     alone: one FFN for all tokens, of as many channels as a token has now (or a count)

    \b
    Examples:
      puzzle build-library examples/parent --data /usr/lib/python3 --out lib
      puzzle build-library examples/parent --data corpus.jsonl --attention kv2,none --ffn 0.5,none --tokens 2M --out lib
      puzzle build-library Qwen/Qwen3-30B-A3B --data corpus --ffn experts=96,experts=64-topk=6,width=0.5,none --out lib
      puzzle build-library meta-llama/Llama-3.1-8B --data 'text/**/*.txt' --memory-limit 80GB --dry-run --out lib
      puzzle build-library healed --origin examples/parent --data corpus.jsonl --out lib-2
      puzzle build-library examples/parent --inputs-from lib/solution --data corpus.jsonl --lr 1e-3 --out lib-again
      torchrun --nproc-per-node 8 -m puzzle.cli build-library parent --data corpus.jsonl --out lib
    """
    num_tokens = parse_count("tokens", tokens, least=0)
    from puzzle.base.ranks import held_by_all, running_ranks
    from puzzle.cli.report import library_summary, print_library, print_plan
    from puzzle.library.build import Builder, BuildOptions, build_library
    from puzzle.library.coupled import take_scores
    from puzzle.library.estimate import plan_of
    from puzzle.library.score import ScoreOptions, score_library
    from puzzle.parents.opened import open_model

    wanted = BuildOptions(data=list(data), out=out, tokens=num_tokens, memory_limit=memory_limit, **chosen)
    if dry_run:
        with running_ranks(wanted.device) as ranks:
            facts = plan_of(Builder(open_model(source), wanted, ranks))
        options.show(lambda: facts, as_json, print_plan)
        return
    with running_ranks(wanted.device) as ranks, held_by_all(out, ranks):
        build_library(source, wanted)
        if score:
            same = {name: chosen[name] for name in ("seq_len", "text_field", "device")} | {"memory_limit": memory_limit}
            scoring = ScoreOptions(sequences=score_sequences, joint=joint, **same)
            with renaming({"sequences": "`score_sequences`"}):
                score_library(out, list(data), scoring, parent=source)
            if wanted.inputs_from is not None and ranks.is_first:
                take_scores(out)
    options.show(lambda: library_summary(out), as_json, print_library)
