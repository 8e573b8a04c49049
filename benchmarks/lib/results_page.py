"""Write docs/results.md from benchmarks/results: per file what was measured, by which command, on what, when, and the figures.

    python benchmarks/lib/results_page.py          (or `make results`)

What was measured is the first line of the script's docstring; the command is the one there, or in the header of a shell
script, that names the file; device, versions and date are columns of the file (a JSON's date stands in the docstring).
`result_tables.py`, `rank_tables.py`, `selection_tables.py` and `serving_tables.py` make the tables.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import large_tables
import library_tables as blocks
import rank_tables
import result_tables as t
import selection_tables
import serving_tables
import training_tables

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS, PAGE = ROOT / "benchmarks", ROOT / "docs" / "results.md"
SYNTHETIC = "lib/synthetic_library.py"
PROMISED = "An architecture solved for {} the throughput, Llama-3.1-8B's shapes, made-up scores, random weights."
H100 = "quality/h100_fusion_heal.sh"
SELECTION = "gpu/selection.sh"
FOUR_GPUS = "benchmarks/gpu/four_gpus.sh WORK {}"
AFTER = "gpu/post_training.sh"
FACTS = (
    "device",
    "costs",
    "costs_device",
    "versions",
    "torch",
    "cuda",
    "triton",
    "python",
    "date",
)  # columns, in order
NAMED = ("torch", "cuda", "triton", "python")  # columns whose values are bare numbers
MIXTURES = "gpu/mixtures.sh"
INTRO = """# Results

Every figure that we measured and kept, from the files in `benchmarks/results/`. `make results` writes this page and a test
compares it: do not edit it. What was learned, and what did not work, stands in [lessons.md](lessons.md).

KL is KL(parent‖child) in nats per token on held-out text, loss the next-token loss there, nMSE the squared error of a sub-block's
output over the output's own square. Predicted and measured are never mixed.
"""


@dataclass(frozen=True, slots=True)
class Result:
    """file: in benchmarks/results. script: in benchmarks/, whose docstring tells of it. title: what sets this file apart.
    build: rows (or a JSON's value) -> Markdown. command_in: where the command stands, if not in the script's docstring.
    what, command: in place of a script's. picture: in docs/."""

    file: str
    script: str | None
    title: str
    build: Callable[[Any], str]
    command_in: str | None = None
    picture: str | None = None
    what: str = ""
    command: str = ""


SECTIONS = {
    "Kernels": (
        Result("rmsnorm.csv", "kernels/bench_rmsnorm.py", "RMSNorm", t.ways("rows", "hidden")),
        Result("rope_kv.csv", "kernels/bench_rope_kv.py", "RoPE", t.ways("tokens", "kv_heads", "cache")),
        Result("swiglu.csv", "kernels/bench_swiglu.py", "SwiGLU", t.ways("rows", "hidden", "width", "dtype")),
        Result("skinny.csv", "kernels/bench_skinny.py", "Products with few rows", t.skinny),
        Result(
            "decode_attention.csv",
            "kernels/bench_decode_attention.py",
            "Decode attention",
            t.ways("batch", "context", "kv_heads", "window", "cache"),
        ),
        Result("linear_kl.csv", "kernels/bench_linear_kl.py", "LM head and KL", t.linear_kl),
        Result("block_loss.csv", "kernels/bench_block_loss.py", "Block loss", t.ways("rows", "hidden")),
        Result(
            "grouped.csv",
            "kernels/bench_grouped.py",
            "Products of experts",
            t.ways("model", "tokens", "rows_per_expert"),
        ),
        Result("routing.csv", "kernels/bench_routing.py", "Routing of experts", t.ways("model", "tokens", "part")),
    ),
    "Speed": (
        Result("road.csv", "speed/bench_road.py", "Promised and delivered: SmolLM2 on one H100", t.road),
        Result("parent_decode.csv", "speed/bench_parent_decode.py", "The intact parent", t.parent_decode),
        Result("predict.csv", "speed/bench_predict.py", "Predicted times, bf16", t.predict, picture="predict.png"),
        Result("predict_fp8.csv", "speed/bench_predict.py", "Predicted times, fp8", t.predict),
        *(
            Result(
                f"predict_{shapes.lower()}.csv",
                "speed/bench_predict.py",
                f"Predicted times, {shapes}",
                t.predict,
                MIXTURES,
            )
            for shapes in ("Nemotron-Nano-9B-v2", "Nemotron-3-Nano-30B-A3B", "Qwen3-30B-A3B")
        ),
        Result(
            "bench_throughput_5x.json", SYNTHETIC, "Promised and delivered: 5x", t.bench, what=PROMISED.format("5x")
        ),
        Result(
            "bench_latency.json",
            SYNTHETIC,
            "Promised and delivered: 3 s",
            t.bench,
            what=PROMISED.format("a latency of 3 s and 1.5x"),
        ),
        Result(
            "profile.csv",
            None,
            "Profiling",
            t.profile,
            what="How fast `puzzle profile` measured the cost tables that are shipped, compiling included.",
            command="puzzle profile --shapes NAME --gpu h100-sxm-80gb [--fp8]",
        ),
        Result("fusion_latency.csv", "speed/bench_fusion_latency.py", "Fused layers", t.fusion_latency),
        Result(
            "fusion_latency_8xh200.csv",
            "speed/bench_fusion_latency.py",
            "Fused layers on eight H200",
            t.fusion_latency,
            command="NCCL_NVLS_ENABLE=0 PYTHONPATH=. torchrun --nproc-per-node 8 benchmarks/speed/bench_fusion_latency.py --tp 8",
        ),
        Result("tp_promise.csv", "speed/bench_tp_promise.py", "The promise of GPUs that share a model", t.tp_promise),
        Result(
            "tp_children.csv",
            "speed/bench_tp_children.py",
            "Children of GPUs that share a model",
            rank_tables.tp_children,
            command="puzzle solve LIBRARY --latency 66% --concurrency 64 (or --throughput 3x) --gpu h100 --tp 2 --input-len 512 --output-len 256 "
            "--out DIR; torchrun --nproc-per-node 2 -m puzzle bench DIR --gpu h100 --tp 2 --with-parent --json\n"
            f"{FOUR_GPUS.format('sums apart children')}     # four H200",
        ),
        Result(
            "published_child.csv",
            "speed/bench_published_child.py",
            "The published child of the 405B",
            rank_tables.published_child,
            command=FOUR_GPUS.format("published"),
        ),
        Result(
            "large_parents.csv",
            "speed/bench_score.py",
            "Scores and evaluation of large parents",
            large_tables.large_parents,
            command="benchmarks/gpu/large_parents.sh WORK scores_8b evaluate_70b",
        ),
        Result(
            "evaluate_ranks.csv",
            "speed/bench_evaluate_ranks.py",
            "Evaluation on two GPUs",
            rank_tables.evaluate_ranks,
            command="benchmarks/gpu/large_parents.sh WORK evaluate_ranks",
        ),
        Result(
            "ranks.csv",
            "speed/bench_ranks.py",
            "Building and healing on several GPUs",
            rank_tables.ranks,
            command=f"HEAL_TOKENS=4M {FOUR_GPUS.format('apart ranks')}",
        ),
        Result("seeds.csv", "speed/bench_seeds.py", "The two Nemotron deployments, with made-up scores", t.seeds),
        Result("build_8b.csv", "speed/bench_build_8b.py", "Building at 8B shapes", t.build_8b),
        Result("build_8b_steps.csv", "speed/bench_build_8b.py", "A step of building at 8B shapes", t.build_8b_steps),
        Result("build_8b_steps_profile.csv", "speed/bench_build_8b.py", "Where a step goes", t.build_8b_profile),
    ),
    "Quality": (
        Result("bld.csv", "quality/bench_bld.py", "Distillation of the default search space", blocks.bld),
        Result("bld_ffn.csv", "quality/bench_bld.py", "Distillation of narrow FFNs for longer", blocks.bld),
        Result(
            "initial.csv",
            "quality/bench_bld.py",
            "Starts of narrow FFNs and of maps of low rank, two ways each: SmolLM2",
            blocks.bld,
            SELECTION,
        ),
        Result("bld_moe.csv", "quality/bench_bld.py", "Distillation of the reference mixture's variants", blocks.bld),
        Result("bld_hybrid.csv", "quality/bench_bld.py", "Distillation of the reference hybrid's variants", blocks.bld),
        Result("mixtures_moe.csv", "quality/bench_mixtures.py", "Children of the reference mixture", blocks.mixtures),
        Result("mixtures_hybrid.csv", "quality/bench_mixtures.py", "Children of the reference hybrid", blocks.mixtures),
        Result("linear.csv", "quality/bench_linear.py", "A sub-block as one matrix, or two of low rank", blocks.linear),
        Result("nested.csv", "quality/bench_nested.py", "Nested FFNs and independent ones", blocks.nested),
        Result("nested_smollm2.csv", "quality/bench_nested.py", "The same of SmolLM2-135M", blocks.nested),
        Result("fp8.csv", "quality/bench_fp8.py", "Children in fp8", t.fp8),
        Result(
            "fp8_smollm2.csv",
            "quality/bench_fp8.py",
            "SmolLM2 and its 2x child in fp8",
            t.fp8,
            command="benchmarks/gpu/smollm2_vllm.sh WORK library profile solve child heal fp8_kl",
        ),
        Result(
            "screen.csv",
            "quality/bench_screen.py",
            "The order of the screen",
            large_tables.screen,
            command="benchmarks/gpu/large_parents.sh WORK screen",
        ),
        Result(
            "precision.csv",
            "quality/bench_precision.py",
            "Precision as a choice",
            t.precision,
            command="python benchmarks/quality/bench_precision.py LIBRARY --gpu h100 --data DATA --speeds 1.1,1.25,1.5,2 --memories 1,0.7 "
            "--input-len 128 --output-len 128 --out benchmarks/results/precision.csv",
        ),
        Result("fusion.csv", "quality/bench_fusion.py", "Fused children, priced for a CPU", t.fusion),
        Result("fusion_h100.csv", "quality/bench_fusion.py", "Fused children, priced for an H100", t.fusion, H100),
        Result(
            "fusion_heal.csv",
            "quality/bench_heal.py",
            "The fused children of the H100, healed",
            t.heal("child"),
            H100,
            "fusion_heal.png",
        ),
        Result("fusion_charge.csv", "quality/bench_fusion_charge.py", "The charge for fusion", t.fusion_charge),
        Result("fusion_aware.csv", "quality/bench_fusion_aware.py", "At equal predicted speed", t.fusion_aware),
        Result(
            "fusion_aware_measured.csv",
            "quality/bench_fusion_aware.py",
            "At equal measured time",
            t.fusion_aware_measured,
            H100,
        ),
        Result(
            "selection.csv",
            "quality/bench_selection.py",
            "Ranking near the optimum",
            selection_tables.selection,
            SELECTION,
        ),
        Result("chosen.csv", "quality/bench_chosen.py", "Chosen children, healed", selection_tables.chosen, SELECTION),
        Result(
            "chosen_long.csv",
            "quality/bench_chosen.py",
            "Chosen children, healed for longer",
            selection_tables.chosen,
            SELECTION,
        ),
        Result(
            "coupled.csv",
            "quality/bench_coupled.py",
            "A second pass on what the child gives",
            selection_tables.coupled,
            SELECTION,
        ),
        Result("heal_lr.csv", "quality/bench_heal.py", "Healing: learning rates", t.heal("lr"), H100),
        Result("heal.csv", "quality/bench_heal.py", "Healing: losses", t.heal("ablation"), H100, "heal.png"),
        Result(
            "stored_logits.csv", "quality/bench_stored_logits.py", "Healing: a stored teacher", t.stored_logits, AFTER
        ),
        Result(
            "other_tokenizer.csv",
            "quality/bench_other_tokenizer.py",
            "Healing: a teacher with another tokenizer",
            training_tables.other_tokenizer,
            AFTER,
        ),
        Result("heal_resume.csv", "quality/bench_heal_resume.py", "Healing: continued", t.heal_resume, H100),
        Result("long_heal.csv", "speed/bench_long_heal.py", "Healing: long text", training_tables.long_heal, AFTER),
        Result(
            "grow.csv", "quality/bench_grow.py", "New experts and fine-tuning everything", training_tables.grow, AFTER
        ),
        Result(
            "post_training.csv",
            AFTER,
            "SFT and GRPO of a child",
            training_tables.post_training,
        ),
        Result(
            "post_training_curves.csv",
            AFTER,
            "SFT and GRPO of a child, by steps",
            training_tables.post_training_curves,
        ),
    ),
    "Serving": (
        Result("serving.csv", "serving/bench_serving.py", "Throughput", serving_tables.serving),
        Result(
            "serving_matrix.csv", "serving/serving_matrix.py", "The matrix of engines", serving_tables.serving_matrix
        ),
        Result(
            "serving_matrix_h100.csv", "serving/serving_matrix.py", "vLLM on a GPU", serving_tables.serving_matrix_gpu
        ),
        Result(
            "serving_matrix_mixtures.csv",
            "serving/serving_matrix.py",
            "Mixtures and hybrids in vLLM on a GPU",
            serving_tables.serving_matrix_gpu,
            MIXTURES,
        ),
        Result("engine_promise.csv", "serving/bench_promise.py", "vLLM and its promise", serving_tables.engine_promise),
        Result(
            "fp8_logprobs.csv",
            "serving/fp8_logprobs.py",
            "A child in fp8 in vLLM",
            serving_tables.fp8_logprobs,
            command="benchmarks/gpu/smollm2_vllm.sh WORK library profile solve child heal fp8 fp8_reference fp8_vllm",
        ),
        Result("export.csv", "serving/bench_export.py", "Memory of an export", serving_tables.export),
    ),
    "Solver": (
        Result("solver.csv", "solver/bench_solver.py", "Time to a proven optimum", t.solver),
        Result("baselines.csv", "solver/bench_baselines.py", "What exact selection buys", t.baselines),
    ),
}


def docstring(script: str) -> str:
    """A Python file's docstring, or the comments at the head of a shell script."""
    text = (BENCHMARKS / script).read_text(encoding="utf-8")
    if script.endswith(".py"):
        return ast.get_docstring(ast.parse(text)) or ""
    head = text.partition("\nset ")[0].splitlines()[1:]
    return "\n".join(line.removeprefix("# ").removeprefix("#") for line in head)


def commands(text: str, file: str) -> list[str]:
    """The commands of a docstring, indented lines there, that name a file of benchmarks/results, in it or in their comment."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    naming = [line for line in lines if line.startswith(" ") and f"benchmarks/results/{file}" in line]
    bare = [re.sub(r"\[--[^]]*\]|\s{2,}#.*", "", line) for line in naming]
    return [" ".join(line.split()) for line in bare]


def facts(rows: list[dict[str, str]]) -> list[str]:
    """The device, versions and dates of the rows, each once."""
    found = []
    for column in FACTS:
        values = dict.fromkeys(row[column] for row in rows if row.get(column))
        word = column if column in NAMED else "costs of" if column.startswith("costs") else ""
        found += [f"{word} {value}".strip() for value in values]
    return list(dict.fromkeys(found))


def section(result: Result) -> str:
    source = BENCHMARKS / "results" / result.file
    said = docstring(result.script) if result.script else ""
    what = result.what or said.splitlines()[0]
    where = docstring(result.command_in) if result.command_in else said
    typed = [result.command] if result.command else commands(where, result.file)
    if source.suffix == ".json":
        value = json.loads(source.read_text(encoding="utf-8"))
        told, shown = [value["device"], *re.findall(r"\d{4}-\d{2}-\d{2}", said)], result.build(value)
    else:
        with open(source, newline="", encoding="utf-8") as handle:
            rows = list(csv.DictReader(handle))
        told, shown = facts(rows), result.build(rows)
    links = [f"[{result.file}](../benchmarks/results/{result.file})"]
    links += [f"[protocol](../benchmarks/{result.script})"] if result.script else []
    parts = [
        f"### {result.title}",
        f"{what} ({', '.join(links)})",
        "```sh\n" + "\n".join(typed) + "\n```",
        " · ".join(told),
    ]
    parts += [shown, *([f"![{result.title}]({result.picture})"] if result.picture else [])]
    return "\n\n".join(parts)


def page() -> str:
    parts = [INTRO.strip()]
    for name, results in SECTIONS.items():
        parts += [f"## {name}", *(section(result) for result in results)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
