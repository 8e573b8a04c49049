"""Tiny heterogeneous children in four real engines: the same logits and the same greedy text, or refused.

    python benchmarks/serving/serving_matrix.py [--engines hf vllm llama.cpp mlx] [--children NAME ...] --out benchmarks/results/serving_matrix.csv
    python benchmarks/serving/serving_matrix.py --gpu [--children NAME ...] --out benchmarks/results/serving_matrix_h100.csv

Protocol: each child of benchmarks/lib/tiny_children.py is lowered for the engine, exported in the engine's format in
float32 and loaded by the engine in its own environment (benchmarks/lib/serving_environments.py), in a process of its own.
The engine's logits of a prompt of 192 tokens and 64 greedy tokens are compared with puzzle's own forward of the child
as it was *before* lowering. A cell passes when max |Δlogit| / std <= 1e-3, all 64 tokens are the same and the engine's
tokenizer encodes a Python text as Hugging Face's does; or when the export is refused with a clear line. `hf` is tested
in both formats that transformers reads; vLLM in the format of its own reader and, through puzzle's plug-in, in `hf`, which is
not lowered. Children with Mamba-2 or experts are tried in stock formats of their own too, by both. Gated DeltaNet runs in bf16 in vLLM on
a CPU, and is judged as with --gpu. What one sequence of the longest prompt
takes in vLLM stands beside what we say: bytes of keys, values and states by its own specs, and of the pages for them.

--gpu: vLLM alone, in this Python, in bf16, 32 prompts of 17 to 3,000 tokens at once; heads of 64. A cell passes when vLLM's mean
|Δ log p| to our float32 is at most 1.2 times that of our own bf16, after the prompts and while they are continued; with experts, the largest of
8 roundings of our own (plain_runs), since one alone is mostly chance (bench_rounding.py). A vLLM whose own reader is wrong about
different KV heads passes when serve-check says so (`detected`), and has to be right once lowered for its version.
--append: cells that --out has stay, and are not run again unless the engine failed. Exit code 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

import torch

from puzzle.base.errors import UserError
from puzzle.base.machine import cpu_name
from puzzle.export.write import Source, export
from puzzle.serving.check import EngineFailed, serve_check
from serving_environments import python_of, require
from tiny_children import ALL, tiny_child, write_tiny_child
from write_rows import read_rows

RESULTS = Path(__file__).resolve().parents[1] / "results" / "serving_matrix.csv"
CELLS = (
    ("hf", "hf"),
    ("hf", "nemotron-nas"),
    ("vllm", "hf"),
    ("vllm", "nemotron-nas"),
    ("llama.cpp", "gguf"),
    ("mlx", "nemotron-nas"),
)  # (engine, format)
GPU_CELLS = (("vllm", "hf"), ("vllm", "nemotron-nas"), ("vllm==0.26", "nemotron-nas"))
NO_RELU2 = ("relu2 on a CPU", "is_act_and_mul=False is supported only for")  # of experts: the plug-in's words, vLLM's
TRIES, BESIDE = 4, "Error in memory profiling"  # vLLM gives up where another process on the GPU ends while it starts
# `puzzle.serving.batch.Batch`
GPU_COLUMNS = ("after", "plain_after", "during", "plain_during", "plain_runs", "same_texts")
STATE_COLUMNS = ("state_bytes", "our_state_bytes", "page_bytes", "our_page_bytes")  # `puzzle.serving.pages.Held`


def run_cell(name: str, engine: str, format: str, directory: Path, gpu: bool) -> dict[str, Any]:
    """One child in one engine. `directory` holds the child's --format hf export, which is the reference."""
    original = directory / name  # as --format hf writes it, before any lowering
    row: dict[str, Any] = {"child": name, "engine": engine, "format": format}
    try:
        child = tiny_child(name, directory / "tokenizer", gpu=gpu)
        source = Source(child=child, solved=None, facts=None, measured=None)
        target = None if "hf" in (engine, format) else engine
        engine = engine.partition("==")[0]
        written = export(source, directory / f"{name}-{engine}-{format}", format=format, engine=target, force=True)
    except UserError as error:
        return {**row, "verdict": "refused", "why": str(error)}
    row["lowerings"] = " ".join(lowering.name for lowering in written.lowerings)
    python = Path(sys.executable) if gpu or engine == "hf" else python_of(engine)
    for left in reversed(range(TRIES)):
        try:
            check = serve_check(written.out, engine, python=python, reference=original)
            break
        except EngineFailed as error:
            if not left or BESIDE not in str(error):
                lacks = not gpu and engine == "vllm" and any(words in str(error) for words in NO_RELU2)
                return {**row, "verdict": "not run" if lacks else "FAILED", "why": str(error)}
    if check.held is not None:
        held = (check.held.theirs, check.held.ours, check.held.their_pages, check.held.pages)
        row |= dict(zip(STATE_COLUMNS, held, strict=True))
    other = "OTHER STATE" if check.held is not None and not check.held.equal else None
    if check.batch is not None and check.delta is None:  # in bf16
        batch, wrong = check.batch, check.hint is not None
        return {
            **row,
            "verdict": (other or "equal") if check.equal else "detected" if wrong else "DIFFERENT",
            **{name: f"{getattr(batch, name):.4f}" for name in GPU_COLUMNS[:4]},
            "plain_runs": batch.plain_runs,
            "same_texts": f"{batch.same_texts}/{batch.num_prompts}",
            "same_tokenizer": check.same_text,
            "version": check.version,
            "why": "" if check.equal else check.hint,
        }
    passed = check.equal and check.num_same == check.num_tokens
    return {
        **row,
        "verdict": (other or "equal") if passed else "DIFFERENT",
        "max_delta_over_std": f"{check.delta:.2e}",
        "same_greedy_tokens": f"{check.num_same}/{check.num_tokens}",
        "same_tokenizer": check.same_text,
        "version": check.version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = list(dict.fromkeys(engine for engine, _ in CELLS))
    children = list(ALL)
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines)
    parser.add_argument("--children", nargs="+", default=children, choices=children)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    cells = GPU_CELLS if arguments.gpu else [cell for cell in CELLS if cell[0] in arguments.engines]
    if not arguments.gpu:
        require(engine for engine in arguments.engines if engine != "hf")
    device = torch.cuda.get_device_name() if arguments.gpu else cpu_name()
    facts = {"device": device, "date": datetime.date.today().isoformat()}
    compared = GPU_COLUMNS if arguments.gpu else ("max_delta_over_std", "same_greedy_tokens")
    columns = [
        "child",
        "engine",
        "format",
        "verdict",
        *compared,
        *STATE_COLUMNS,
        "same_tokenizer",
        "lowerings",
        "why",
        "version",
        *facts,
    ]
    rows = [row for row in read_rows(arguments.out, arguments.append) if row["verdict"] != "FAILED"]
    there = {tuple(row[name] for name in columns[:3]) for row in rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(arguments.out, "w", newline="", encoding="utf-8") as handle,
        tempfile.TemporaryDirectory(prefix="serving-matrix-") as temporary,
    ):
        writer = csv.DictWriter(handle, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        handle.flush()
        for name in arguments.children:
            own = [("vllm", format) for format in ALL[name].formats if arguments.gpu or "vllm" in arguments.engines]
            own += [("hf", format) for format in ALL[name].formats if not arguments.gpu and "hf" in arguments.engines]
            left = [cell for cell in (*cells, *own) if (name, *cell) not in there]
            if left:
                write_tiny_child(name, Path(temporary) / name, gpu=arguments.gpu)
            for engine, format in left:
                row = {**run_cell(name, engine, format, Path(temporary), arguments.gpu), **facts}
                rows.append(row)
                writer.writerow(row)
                handle.flush()
                shown = " ".join(str(row[c]) for c in (*compared, "lowerings", "why") if row.get(c))
                print(f"{name:<20} {engine:<10} {format:<13} {row['verdict']:<9} {shown}", flush=True)
    bad = [row for row in rows if row["verdict"] not in ("equal", "refused", "detected", "not run")]
    print(f"{len(rows) - len(bad)} of {len(rows)} cells equal or refused; wrote {arguments.out}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
