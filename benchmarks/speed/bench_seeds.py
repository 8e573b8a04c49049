"""The deployments that NVIDIA's two Puzzle models were made for, solved with made-up scores: size and promise beside the papers' figures.

The recipes in examples/ say goal, workload and what is offered; scores are synthetic (`benchmarks/lib/synthetic_library.py`), so
that size and speed count here and not which layers are replaced. Times are those of the shipped H100 tables in fp8, which were measured; the
all-reduces of eight GPUs were measured on H200s; the sum over parts is the promise, computed and not measured as a whole. The papers
report 49.867 B parameters for 5x (arXiv 2411.19146, 2505.00949), and 253.401 B and 1.71x (arXiv 2503.18908, 2505.00949), on engines
and workloads of their own. `--latency`: goals for the 405B, the recipe's own first. Needs no GPU.

    PYTHONPATH=. python benchmarks/speed/bench_seeds.py --csv benchmarks/results/seeds.csv
"""

from __future__ import annotations

import csv
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.choose.solve import solve_library
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Architecture
from puzzle.run.recipe import Recipe, read_recipe
from synthetic_library import main as synthetic_library

ROOT = Path(__file__).resolve().parents[2]
PAPERS = {  # parameters, what they say of speed
    "llama_70b_one_h100": (49.867e9, "5x throughput"),
    "llama_405b_eight_h100": (253.401e9, "1.71x lower latency"),
}
COLUMNS = (
    "recipe,goal,parameters_B,paper_parameters_B,paper_speed,throughput_x,latency_x,parent_batch,batch,parent_memory_GB,memory_GB,memory_with_cached_tokens_GB,"
    "layers_with_attention,ffns,fused_runs,missed,kv_bytes_per_token,tp,costs_device,all_reduces_of,status"
)


def solved(recipe: Recipe, library: Path) -> Architecture:
    asked, gpu = recipe.solve, recipe.profile.gpu
    opened = asked.shared(Library.open(library), gpu)
    costs = asked.costs(opened, gpu, f"{recipe.parent}-fp8")
    request = asked.request(opened, gpu, recipe.workload, recipe.goal.goal())
    return solve_library(opened, costs, request)


def row_of(name: str, recipe: Recipe, found: Architecture) -> dict[str, str]:
    child, parent, structure = found.predicted, found.parent_predicted, found.structure()
    goal = ", ".join(f"{k} {v}" for k, v in found.goal.items() if v is not None)
    attending = sum(any(b.state().per_token for b in layer.values()) for layer in structure.layers)
    parameters, speed = PAPERS[name]
    more = found.goal["cached_tokens"] - child.batch * (recipe.workload.input_len + recipe.workload.output_len)
    sums = found.costs.get("all_reduce") or {"device": "-"}
    values = {
        "recipe": name,
        "goal": goal,
        "parameters_B": f"{child.num_parameters / 1e9:.3f}",
        "paper_parameters_B": f"{parameters / 1e9:.3f}",
        "paper_speed": speed,
        "throughput_x": f"{found.speedup:.3f}",
        "latency_x": f"{parent.latency_seconds / child.latency_seconds:.3f}",
        "parent_batch": str(parent.batch),
        "batch": str(child.batch),
        "parent_memory_GB": f"{parent.memory_bytes / 1e9:.1f}",
        "memory_GB": f"{child.memory_bytes / 1e9:.1f}",
        "memory_with_cached_tokens_GB": f"{(child.memory_bytes + more * child.kv_bytes_per_token) / 1e9:.1f}",
        "layers_with_attention": f"{attending} of {found.parent.num_layers}",
        "ffns": str(sum(layer["ffn"].num_parameters > 0 for layer in structure.layers)),
        "fused_runs": str(len(found.fuse or ())),
        "missed": " ".join((found.fusion or {"missed": []})["missed"]),
        "kv_bytes_per_token": str(child.kv_bytes_per_token),
        "tp": str(found.tp),
        "costs_device": found.costs["device"],
        "all_reduces_of": sums["device"],
        "status": found.status,
    }
    assert list(values) == COLUMNS.split(",")
    return values


@click.command()
@click.option("--latency", default="66%,55%", show_default=True)
@click.option("--csv", "out", type=click.Path(path_type=Path))
def main(latency: str, out: Path | None) -> None:
    rows = []
    for name in PAPERS:
        recipe = read_recipe(ROOT / "examples" / f"{name}.yaml")
        goals = [recipe.goal]
        if "latency" in recipe.goal.read().limits:
            goals = [replace(recipe.goal, **{"latency": one}) for one in latency.split(",")]  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            offered = {"--attention": recipe.build.attention, "--ffn": recipe.build.ffn}
            words = [word for option, text in offered.items() if text is not None for word in (option, text)]
            synthetic_library.main([recipe.parent, f"{folder}/lib", *words], standalone_mode=False)
            for goal in goals:
                rows.append(row_of(name, recipe, solved(replace(recipe, goal=goal), Path(folder) / "lib")))
                print("\n".join(f"  {key}: {value}" for key, value in rows[-1].items()))
    if out is not None:
        with open(out, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS.split(","), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
