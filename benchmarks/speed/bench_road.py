"""Do `run`, `evaluate` and `bench` say the same, and what `solve` promised? The whole road of a recipe for several goals.

The first goal goes the recipe's road as it is; the others share its library and costs and leave healing out. After each, `evaluate`
and `bench` measure again what `run` measured, each in a process of its own. WORK keeps what each verb printed as JSON; what is
there is not done again. Writes a row per goal.

    python benchmarks/speed/bench_road.py examples/smollm2_h100.yaml --data CORPUS --gpu h100 --work WORK \\
        --out benchmarks/results/road.csv
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import yaml

COLUMNS = (
    "goal", "promised", "run", "evaluate", "bench", "promised_tokens_per_second", "tokens_per_second", "predicted_memory_bytes",
    "memory_bytes", "sum_of_scores", "kl", "loss", "parent_loss", "healed_tokens", "build_s", "score_s", "profile_s", "heal_s",
    "evaluate_s", "device", "date",
)  # fmt: skip


def puzzle(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "puzzle", *map(str, arguments), "--json"]
    done: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return done


def kept(path: Path, *arguments: object) -> dict[str, Any]:
    """What a verb printed, now or earlier."""
    if not path.is_file():
        path.write_text(json.dumps(puzzle(*arguments) | {"date": time.strftime("%Y-%m-%d")}))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def plain(recipe: Path, work: Path) -> Path:
    """The recipe without healing."""
    value = yaml.safe_load(recipe.read_text())
    value.pop("heal", None)
    value["parent"] = str((recipe.parent / value["parent"]).resolve())
    target = work / "plain.yaml"
    target.write_text(yaml.safe_dump(value))
    return target


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--data", required=True)
@click.option("--gpu", required=True)
@click.option("--goals", default="2,1.5,3")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(recipe: Path, data: str, gpu: str, goals: str, work: Path, out: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    parent = recipe.parent / yaml.safe_load(recipe.read_text())["parent"]
    with open(out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for number, goal in enumerate(goals.split(",")):
            one, road = (recipe if number == 0 else plain(recipe, work)), work / "road"
            asked = ("--throughput", f"{goal}x", "--data", data, "--out", road)
            ran = kept(work / f"run{goal}.json", "run", one, *asked)
            child = road / ran["exports"]["hf"]
            again = kept(work / f"ev{goal}.json", "evaluate", parent, child, "--data", data, "--sequences", 16)
            alone = kept(work / f"be{goal}.json", "bench", road / "solution", "--gpu", gpu, "--with-parent")
            writer.writerow(row(goal, ran, again, alone))
            handle.flush()


def row(goal: str, ran: dict[str, Any], again: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    seconds = ran["seconds"]
    return {
        "goal": goal,
        "promised": ran["predicted"]["speedup"],
        "run": ran["measured"]["speedup"],
        "evaluate": again["speedup"],
        "bench": alone["speedup"]["measured"],
        "promised_tokens_per_second": ran["predicted"]["tokens_per_second"],
        "tokens_per_second": ran["measured"]["tokens_per_second"],
        "predicted_memory_bytes": ran["predicted"]["memory_bytes"],
        "memory_bytes": ran["measured"]["memory_bytes"],
        "sum_of_scores": ran["child"]["sum_of_scores"],
        "kl": ran["child"]["kl"],
        "loss": ran["child"]["loss"],
        "parent_loss": ran["parent"]["loss"],
        "healed_tokens": ran.get("healed", {}).get("num_tokens", 0),
        **{f"{name.split('-')[0]}_s": s for name, s in seconds.items() if f"{name.split('-')[0]}_s" in COLUMNS},
        "device": ran["device"],
        "date": ran["date"],
    }


if __name__ == "__main__":
    main()
