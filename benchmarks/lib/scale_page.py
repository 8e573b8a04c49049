"""Write what docs/scale.md says in figures, between its markers, and MFU in puzzle/run/shapes.py, from which all of them are computed.

    python benchmarks/lib/scale_page.py          (or `make results`)

MFU is of the fastest row of benchmarks/results/build_8b_steps.csv with nothing turned off; the profiles' times are those of
benchmarks/results/profile.csv. Everything else is what a dry run of such a recipe computes.
"""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

from puzzle.blocklib.variant import search_spaces
from puzzle.choose.goal import GoalOptions
from puzzle.heal.settings import HealOptions
from puzzle.library.build import BuildOptions
from puzzle.library.plan import trained, training_flops
from puzzle.library.score import ScoreOptions
from puzzle.parents.known import known_structure
from puzzle.profile.profile import ProfileOptions
from puzzle.run import shapes
from puzzle.run.recipe import Recipe, read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE, CODE, RESULTS = ROOT / "docs" / "scale.md", ROOT / "puzzle" / "run" / "shapes.py", ROOT / "benchmarks" / "results"
STEPS = "build_8b_steps.csv"
PARENTS = {"8B": "llama-3.1-8b", "70B": "llama-3.3-70b", "405B": "llama-3.1-405b"}
SEEDS = {"70B": "llama_70b_one_h100", "405B": "llama_405b_eight_h100"}
SPACE: dict[str, Any] = {"attention": "kv4,kv2,kv1,linear,none", "ffn": "0.75,0.5,0.25,0.1,linear,none"}
GOAL: dict[str, Any] = {"latency": "60%"}  # any
SEQ_LEN, SEQUENCES, BUILT, SCORED = 8192, 4, 10**9, 10**6
NODE, NODE_HOST = 8, 2 * 10**12  # GPUs, bytes of host memory


def rows(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def measured() -> dict[str, str]:
    """The row that MFU is of."""
    return max((row for row in rows(STEPS) if not row["still_off"]), key=lambda row: float(row["mfu"]))


def code() -> str:
    """puzzle/run/shapes.py with MFU as it was measured."""
    told = f"MFU = {measured()['mfu']}  # benchmarks/lib/scale_page.py writes it, from benchmarks/results/{STEPS}"
    return re.sub(r"(?m)^MFU = .*$", told, CODE.read_text(encoding="utf-8"))


@cache
def dry_run(name: str) -> dict[str, Any]:
    """Of a parent with SPACE, 10⁹ tokens of building and of healing, and one sequence of scores."""
    return shapes.plan_shapes(
        Recipe(
            parent=name,
            build=BuildOptions(data=[], out=Path(), tokens=BUILT, seq_len=SEQ_LEN, batch_size=SEQUENCES, **SPACE),
            score=ScoreOptions(sequences=128),
            profile=ProfileOptions(gpu="h100"),
            goal=GoalOptions(**GOAL),
            heal=HealOptions(child="", out=Path(), tokens=BUILT, seq_len=SEQ_LEN, batch_size=256),
        )
    )


@cache
def of_seed(name: str) -> dict[str, float]:
    """GPU-hours of the stages of a recipe."""
    stages = shapes.plan_shapes(read_recipe(ROOT / "examples" / f"{SEEDS[name]}.yaml"))["stages"]
    return {stage: row["gpu_hours"] or 0.0 for stage, row in stages.items()}


def figures(name: str) -> dict[str, str]:
    """Of one parent: a cell a row of the table."""
    structure, planned = known_structure(name), dry_run(name)
    stages, layers = planned["stages"], dict(enumerate(structure.layers))
    spaces = search_spaces(layers, SPACE)
    flops = sum(training_flops(layers[i], space, SEQ_LEN, False) for i, space in spaces.items())
    each = [sum(sub_block.num_parameters for sub_block in trained(space, False)) for space in spaces.values()]
    variants = len([n for space in spaces[0].values() for n in space]) - len(spaces[0])
    passes = 1 + variants * (structure.num_layers + 1) / 2
    weights = structure.num_parameters
    scored = stages["score"]["gpu_hours"] * SCORED / (128 * SEQ_LEN)
    timed = {row["shapes"]: float(row["seconds"]) for row in rows("profile.csv") if row["dtype"] == "bfloat16"}
    shared = f" whole, {timed[f'{name}-tp8']:.0f} s as eight share it" if f"{name}-tp8" in timed else ""
    return {
        "L, H, P": f"{structure.num_layers}, {structure.hidden_size}, {billions(weights, 1)}",
        "trained parameters of a layer, of all": f"{billions(each[0], 2)}, {billions(sum(each), 0)}",
        "build: FLOPs a token": scientific(flops),
        "build: GPU-hours a 10⁹ tokens": f"{stages['build-library']['gpu_hours']:,.0f}",
        "build: tokens/s a GPU": f"{BUILT / stages['build-library']['seconds']:,.0f}",
        f"build: GPU memory of one layer, {SEQUENCES} sequences a step": amount(
            stages["build-library"]["memory_bytes"]
        ),
        "build: activations between groups, a 10⁹ tokens": amount(2 * BUILT * structure.hidden_size),
        "library on disk": amount(2 * sum(each)),
        "score: passes of the parent; GPU-hours a 10⁶ tokens": f"{passes:.0f}; {scored:,.{0 if scored > 10 else 1}f}",
        "parent in bf16": amount(2 * weights),
        "profile, measured on an H100 (`puzzle profile --shapes NAME --gpu h100`)": f"{timed[name]:.0f} s{shared}",
        "heal: GPU-hours a 10⁹ tokens": f"{stages['heal']['gpu_hours']:,.0f}",
        "heal: memory of parent, child and optimiser": amount(stages["heal"]["memory_bytes"]),
        "heal: two checkpoints": amount(2 * 12 * weights),
    }


def parents() -> str:
    columns = {name: figures(shape) for name, shape in PARENTS.items()}
    lines = [[told, *(column[told] for column in columns.values())] for told in columns["8B"]]
    return table(["", *columns], lines)


def rate() -> str:
    row = measured()
    return fill(
        f"MFU is {row['mfu']}, measured: training steps of block-local distillation at Llama-3.1-8B's shapes, {int(row['tokens_a_step']):,} "
        f"tokens a step (`benchmarks/speed/bench_build_8b.py`, {row['device']}, {row['date']}, [results.md](results.md)), tokens per second "
        "times the FLOPs below.",
        width=140,
    )


def seeds() -> str:
    totals = {name: (sum(of_seed(name).values()), of_seed(name)["heal"]) for name in SEEDS}
    whole = " and ".join(f"{rounded(total)} for the {name}" for name, (total, _) in totals.items())
    healing = " and ".join(rounded(heal) for _, heal in totals.values())
    return f"GPU-hours in all: {whole}, of which healing is {healing}."


def limits() -> str:
    """The 405B, by its recipe, on one node and on eight."""
    hours, parent = of_seed("405B"), dry_run(PARENTS["405B"])["stages"]
    scored = parent["score"]["gpu_hours"] * SCORED / (128 * SEQ_LEN)
    waiting = NODE_HOST / (2 * known_structure(PARENTS["405B"]).hidden_size)
    lines = [
        ["GPU memory, host memory", *(f"{amount(n * NODE * 84e9)}, {amount(n * NODE_HOST)}" for n in (1, 8))],
        ["building on 10⁹ tokens", *(days(hours["build-library"] / NODE / n) for n in (1, 8))],
        ["scores of 10⁶ tokens, all variants of the table above", *(days(scored / NODE / n) for n in (1, 8))],
        ["healing on 65·10⁹ tokens", *(days(hours["heal"] / NODE / n) for n in (1, 8))],
        ["tokens whose activations one host's memory holds", *[f"{waiting / 1e6:.0f}·10⁶"] * 2],
    ]
    return table(["", "one node, 8 H100", "eight nodes, 64 H100"], lines)


def table(columns: list[str], lines: list[list[str]]) -> str:
    shown = [columns, ["---"] * len(columns), *lines]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in shown)


def billions(value: float, digits: int) -> str:
    return f"{value / 1e9:.{digits}f}·10⁹"


def scientific(value: float) -> str:
    base, _, power = f"{value:.2e}".partition("e+")
    return f"{base}·10{str(int(power)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def amount(value: float) -> str:
    """Three digits at most, in decimal units."""
    return f"{value / 1e12:.3g} TB" if value >= 1e12 else f"{value / 1e9:.3g} GB"


def rounded(value: float) -> str:
    return f"{round(value, -2):,.0f}"


def days(hours: float) -> str:
    return f"{hours:.2g} h" if hours < 48 else f"{hours / 24:,.0f} days"


PARTS = {"rate": rate, "parents": parents, "seeds": seeds, "limits": limits}


def page() -> str:
    """docs/scale.md with every part between its markers made anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, make in PARTS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{PAGE} lacks the markers of '{name}'")
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    CODE.write_text(code(), encoding="utf-8")
    shapes.MFU = float(measured()["mfu"])
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE} and MFU in {CODE}")
