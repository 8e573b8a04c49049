"""Memory and tokens a second of healing stages of 4k to 32k tokens a sequence, as planned and as measured.

Protocol: the parent gets YaRN from its trained length to the longest stage (an existing scaling of its own is kept), so that its weights and
work are its own. The child has no attention in every third layer. Every length has as many tokens a step as the longest sequence, or --tokens-per-step,
in micro-batches of one sequence, with activations computed again in the backward pass. Each is a process of its own: planned memory is the formula
of puzzle/heal/memory.py, planned tokens a second are those of `heal --dry-run`; measured are the most that torch has reserved, and has given out (on a CPU the most that the
process has held) and the median over the last half of the steps.

    python benchmarks/speed/bench_long_heal.py --parent HuggingFaceTB/SmolLM2-135M --out benchmarks/results/long_heal.csv     # one GPU
    python benchmarks/speed/bench_long_heal.py --lengths 1024,4096 --steps 2 --max-files 40 --out /tmp/long_heal.csv         # rehearsal
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.machine import cpu_name
from puzzle.base.ranks import start_ranks
from puzzle.blocklib.none import NO_OP
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.heal.log import read_log
from puzzle.heal.memory import plan_memory
from puzzle.heal.plan import plan_heal
from puzzle.heal.prepare import open_models
from puzzle.heal.run import heal
from puzzle.heal.settings import HealOptions
from puzzle.parents.opened import open_model
from reference_corpus import write_corpus
from write_rows import read_rows, write_rows

PARENT = Path(__file__).resolve().parents[2] / "examples" / "parent"


def lengthened(parent: str, longest: int, out: Path) -> None:
    """The same checkpoint, made for `longest` tokens by YaRN where it was made for fewer."""
    shutil.copytree(open_model(parent).directory, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    trained = config["max_position_embeddings"]
    if trained < longest:
        old = config.pop("rope_parameters", None) or {"rope_theta": config.get("rope_theta", 10000.0)}
        config.pop("rope_scaling", None)
        scaled = {"rope_type": "yarn", "factor": longest / trained, "original_max_position_embeddings": trained}
        config |= {"max_position_embeddings": longest, "rope_parameters": {"rope_theta": old["rope_theta"], **scaled}}
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def measure(options: HealOptions) -> dict[str, Any]:
    """One length, in this process."""
    stages, ranks = options.plan_stages(), start_ranks(options.device)
    plan = plan_memory(options, stages, open_models(options, stages, ranks), ranks)
    promised = plan_heal(options)["predicted"]
    gpu = ranks.device.type == "cuda"
    gc.collect()  # AdamW refers to itself: the dry run's weights and graph would stay beside the healing's
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    record = heal(options)
    held = torch.cuda.max_memory_reserved() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speeds = [line["tokens_per_second"] for line in read_log(options.out / "heal.jsonl") if "tokens_per_second" in line]
    return {
        "seq_len": options.seq_len,
        "batch_size": options.batch_size,
        "steps": record["num_steps"],
        "promised_bytes": plan.device_bytes,
        "measured_bytes": held,
        "alive_bytes": torch.cuda.max_memory_allocated() if gpu else "",
        "promised_tokens_per_second": promised["tokens_per_second"],
        "measured_tokens_per_second": statistics.median(speeds[len(speeds) // 2 :]),
        "loss_after": round(record["after"]["loss"], 4),
        "recompute": options.recompute,
        "dtype": record["run"]["dtype"],
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


@click.command()
@click.option("--parent", default=str(PARENT))
@click.option("--lengths", default="4096,8192,16384,32768", show_default=True)
@click.option("--tokens-per-step", type=int, help="Default: the longest length.")
@click.option("--steps", default=40, show_default=True)
@click.option("--recompute/--no-recompute", default=True)
@click.option("--max-files", type=int)
@click.option("--device", default="auto")
@click.option("--append", is_flag=True, help="What --out has stays, and is not measured again.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    parent: str, lengths: str, tokens_per_step: int | None, steps: int, recompute: bool, max_files: int | None, device: str, append: bool, out: Path
) -> None:  # fmt: skip
    """A row per length."""
    wanted = [int(length) for length in lengths.split(",")]
    per_step, rows = tokens_per_step or max(wanted), read_rows(out, append)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_corpus(root / "corpus.jsonl", max_files)
        lengthened(parent, max(wanted), root / "parent")
        child = child_of_checkpoint(root / "parent")
        layers = [layer.put("attention", NO_OP) if n % 3 == 2 else layer for n, layer in enumerate(child.layers)]
        write_hf(replace(child, layers=tuple(layers)), root / "child", "card")
        for seq_len in wanted:
            if str(seq_len) in [row["seq_len"] for row in rows]:
                continue
            batch = per_step // seq_len
            options = HealOptions(
                child=str(root / "child"), teacher=str(root / "parent"), data=[str(root / "corpus.jsonl")], out=root / "out",
                tokens=steps * batch * seq_len, seq_len=seq_len, batch_size=batch, accumulate=batch, recompute=recompute, eval_every=0,
                save_every=0, validation_sequences=2, device=device, force=True,
            )  # fmt: skip
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows.append({"parent": Path(parent).name, **pool.submit(measure, options).result()})
            click.echo(rows[-1])
            write_rows(out, rows)


if __name__ == "__main__":
    main()
