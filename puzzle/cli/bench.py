"""`puzzle bench`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from puzzle.base.console import console
from puzzle.base.errors import UserError
from puzzle.cli import options
from puzzle.cli.modes import Mode, Verb

MODES = (
    Mode("without `engine`", lambda p: p["engine"] is None, unused="python reader"),
    Mode("with `engine`", lambda p: p["engine"] is not None, unused="tp"),
)


@click.command("bench", cls=Verb, modes=MODES)
@click.argument("target", type=options.PATH, metavar="CHILD|ARCHITECTURE")
@click.option("--gpu", required=True, help="This machine's: h100, or cpu.")
@options.priced_input_len
@options.priced_output_len
@click.option("--batch", type=int, callback=options.positive, help="Default: what was predicted to be best.")
@click.option(
    "--tp", type=int, metavar="N", help="N processes, under torchrun, share the model. Default: as solved for, else 1."
)
@click.option("--fp8", is_flag=True, help="Weights and KV cache in fp8.")
@click.option("--engine", help="Measure in this serving engine instead of our runtime: vllm, where it is installed.")
@options.engine_python
@click.option(
    "--format", "reader", help="Of random weights for vLLM: hf (by the plug-in) or nemotron-nas. Default: as priced."
)
@click.option("--with-parent", is_flag=True, help="Measure the parent too, at its own best batch.")
@click.option(
    "--repeats", type=int, callback=options.positive, default=3, help="Timed runs of each; the median counts."
)
@options.as_json
def bench_command(
    target: Path,
    input_len: int | None,
    output_len: int | None,
    fp8: bool,
    engine: str | None,
    python: Path | None,
    reader: str | None,
    as_json: bool,
    tp: int | None,
    **chosen: Any,
) -> None:
    """Measure throughput, time to first token and time per token beside the prediction.

    With --engine vllm in vLLM, offline: a checkpoint as it is served, an architecture with random weights; beside the promise of
    `puzzle solve --engine vllm`, and with the tokens that vLLM's cache holds.

    \b
    Examples:
      puzzle bench lib/solution --gpu h100 --with-parent
      puzzle bench child --gpu h100 --input-len 2048 --output-len 256 --batch 32
      puzzle bench child --engine vllm --gpu h100 --with-parent
      torchrun --nproc-per-node 2 -m puzzle bench lib/solution --gpu h100 --tp 2 --with-parent
    """
    asked = {"work": options.workload(input_len, output_len), "precision": "fp8" if fp8 else None, **chosen}
    if engine is None:
        from puzzle.measure.bench import bench

        found = bench(target, tp=tp, **asked)
    else:
        from puzzle.serving.check import EngineFailed
        from puzzle.serving.engine_bench import bench_engine

        try:
            found = bench_engine(engine, target, python=python, reader=reader, **asked)
        except EngineFailed as error:
            raise UserError(f"{target}: {error}") from error
    if not console.quiet:  # of several processes the first one speaks
        options.print_json(found) if as_json else _print(found)


def _print(found: dict[str, Any]) -> None:
    from puzzle.cli.report import print_table

    rows: list[tuple[str, ...]] = []
    for who in ("child", "parent"):
        if who not in found:
            continue
        measured, predicted = found[who]["measured"], found[who]["predicted"] or {}
        rows.append((f"[bold]{who}, batch {measured['batch']}",))
        for key, label, scale in (
            ("tokens_per_second", "tokens/s", 1.0),
            ("ttft_seconds", "time to first token, ms", 1e3),
            ("tpot_seconds", "time per output token, ms", 1e3),
            ("memory_bytes", "weights and cache, GB" if "engine" in found else "memory at the peak, GB", 1e-9),
            ("cached_tokens", "tokens that its cache holds", 1),
        ):
            ours, theirs = (None if side.get(key) is None else side[key] * scale for side in (measured, predicted))
            if ours is not None:
                told = ("–", "–") if theirs is None else (f"{theirs:.5g}", f"{ours / theirs:.3f}")
                rows.append((label, told[0], f"{ours:.5g}", told[1]))
    if "speedup" in found:
        told = found["speedup"]
        promised = "–" if told["predicted"] is None else f"{told['predicted']:.3g}x"
        rows.append(("speed-up, each at its best batch", promised, f"{told['measured']:.3g}x"))
    engine = f", {found['child']['measured']['versions']}" if "engine" in found else ""
    title = f"{found['device']}{engine}, {found['precision']}, {found['workload']}"
    print_table(title, ("", "predicted", "measured", "measured / predicted"), rows)
