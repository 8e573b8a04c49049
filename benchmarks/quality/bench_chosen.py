"""What is left, after healing, of what choosing by measured divergence buys; and what a road in steps buys.

Protocol: one library and one cost table, of RECIPE without its healing. At every speed-up, by `solve`: the additive MIP (`mip`), the best
of finalists (`finalists`), with interactions (`pairs`), after new scores around the MIP's child (`rescored`), around the best of
finalists and pairs (`all`). Each in a copy of the library, so that none is spared what another one has measured. Then `steps`: half of
the speed-up first (its square root), healed on --between tokens, and the rest from there. All meet the same limit at the same prices and
are healed on as many tokens as RECIPE (or --tokens) says, those between the steps among them. `depth`, `uniform-width`, `greedy` and `random`
are `solve --baseline`, at the same limit. KL(parent‖child) and loss on --sequences of held-out text, the first of which the choices have
seen; `measured` is the speed of `bench` over that of the parent, `choose_s` what choosing takes beyond library and scores, which `library_s`
has; with --task-data the healed child's share of right answers in each task, and its error.

    python benchmarks/quality/bench_chosen.py examples/smollm2_h100.yaml library choose heal steps --parent MODEL --data DATA \\
        --work WORK --out benchmarks/results/chosen.csv

What is in WORK is not done again; nothing runs longer than --minutes in all: the same command goes on. GPUs may share WORK, each with
--methods of its own once library and choices are there, and an --out of its own; `table` alone writes the rows of all. Rehearsal on a CPU:

    python benchmarks/quality/bench_chosen.py examples/quickstart.yaml library choose heal steps --data /usr/lib/python3.11 \\
        --work WORK --out chosen.csv --speeds 1.3 --finalists 4 --rounds 1 --sequences 8 --chosen-on 4 --between 8192
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import yaml

from puzzle.base.files import content_hash
from puzzle.measure.architecture import read_architecture

PARTS = ("library", "choose", "bench", "heal", "steps", "tasks", "table")
BASELINES = ("depth", "uniform-width", "greedy", "random")
COLUMNS = ("speed", "method", "promised", "measured", "sum_of_scores", "choose_s", "library_s", "heal_s", "healed_tokens", "kl", "kl_stderr",
           "loss", "kl_healed", "kl_healed_stderr", "loss_healed", "parent_loss", "tasks", "changed", "device", "date")  # fmt: skip


class OutOfTime(Exception):
    pass


class Bench:
    def __init__(
        self, recipe: dict[str, Any], work: Path, data: tuple[str, ...], sequences: int, seconds: float, longest: float
    ):
        self.recipe, self.work, self.sequences, self.until = recipe, work, sequences, time.monotonic() + seconds
        self.longest, self.tag = longest, ""  # tag: of what depends on the tokens of the healing
        self.data = [word for one in data for word in ("--data", one)]
        self.base = work / "base" / "0" / "step-1"  # as deep as a step of a run, to which its parent is on the same way
        work.mkdir(parents=True, exist_ok=True)

    def once(self, name: str, *arguments: object) -> dict[str, Any]:
        """What a verb printed, now or earlier, and its seconds, those of calls that were cut off among them."""
        path, spent = self.work / f"{name}.json", self.work / f"{name}.spent"
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        left, before = self.until - time.monotonic(), float(spent.read_text()) if spent.is_file() else 0.0
        if left < self.longest:
            raise OutOfTime
        path.parent.mkdir(parents=True, exist_ok=True)
        begin, command = time.monotonic(), [sys.executable, "-m", "puzzle", *map(str, arguments), "--json"]
        try:
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=left)
        except subprocess.TimeoutExpired as error:
            raise OutOfTime from error
        finally:
            seconds = before + time.monotonic() - begin
            spent.write_text(str(seconds))
        found = {"said": json.loads(done.stdout), "seconds": seconds}
        path.write_text(json.dumps(found))
        print(f"{name}: {seconds:.1f} s", flush=True)
        return found

    def written(self, name: str, **changed: Any) -> Path:
        """The recipe with these sections; None leaves one out."""
        whole = {key: value for key, value in (self.recipe | changed).items() if value is not None}
        path = self.work / f"{name}.yaml"
        path.write_text(yaml.safe_dump(whole))
        return path

    def goal(self, speed: float) -> dict[str, Any]:
        return self.recipe["goal"] | {"throughput": f"{speed:g}x"}

    def library(self, speed: float) -> None:
        plain = self.written("plain", goal=self.goal(speed), heal=None, fuse=None, export="hf")
        self.once("library", "run", plain, *self.data, "--out", self.base)

    def choose(self, speed: float, method: str, flags: list[object]) -> None:
        copy, work = self.work / "copies" / f"{method}-{speed:g}" / "0" / "library", self.recipe["workload"]
        if not copy.is_dir():
            partial = copy.with_name("partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.base / "library", partial, copy_function=os.link)
            shutil.rmtree(partial / "children", ignore_errors=True)
            partial.rename(copy)
        asked = ["--throughput", f"{speed:g}x", "--gpu", self.recipe["profile"]["gpu"], *self.flags(work)]
        text = self.data if "--sequences" in flags else []
        self.once(
            f"chosen/{method}-{speed:g}", "solve", copy, *asked, *flags, *text, "--out", self.solution(speed, method)
        )
        self.measure(speed, method, self.solution(speed, method), "--library", self.base / "library")

    def flags(self, values: dict[str, Any]) -> list[object]:
        return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]

    def solution(self, speed: float, method: str) -> Path:
        return self.work / "chosen" / f"{method}-{speed:g}"

    def name(self, speed: float, method: str) -> str:
        """Of a child: those that are alike are one."""
        return content_hash(read_architecture(self.solution(speed, method)).variants)[:16]

    def measure(self, speed: float, method: str, child: Path, *more: object) -> None:
        asked = ("--sequences", self.sequences, "--seq-len", self.recipe["evaluate"].get("seq_len", 1024), "--no-speed")
        name = f"before/{self.name(speed, method)}" if method != "steps" else f"before/steps-{speed:g}"
        self.once(name, "evaluate", self.recipe["parent"], child, *more, *self.data, *asked)

    def heal(self, speed: float, method: str) -> None:
        name = self.name(speed, method)
        child, healed = self.work / "children" / name, self.work / f"healed{self.tag}" / name
        if not child.is_dir():
            self.once(f"exported/{name}", "export", self.base / "library", self.solution(speed, method), "--out", child)
        asked = ("--teacher", self.recipe["parent"], *self.data, *self.flags(self.recipe["heal"]))
        self.once(f"heal{self.tag}/{name}", "heal", child, *asked, "--out", healed)
        self.after(name, healed)

    def after(self, name: str, healed: Path) -> None:
        asked = ("--sequences", self.sequences, "--seq-len", self.recipe["evaluate"].get("seq_len", 1024), "--no-speed")
        self.once(f"after{self.tag}/{name}", "evaluate", self.recipe["parent"], healed, *self.data, *asked)

    def bench(self, speed: float, method: str) -> None:
        solution, gpu = self.solution(speed, method), self.recipe["profile"]["gpu"]
        self.once(f"bench/{method}-{speed:g}", "bench", solution, "--gpu", gpu, "--with-parent")

    def tasks(self, speed: float, method: str, task_data: Path, names: str) -> None:
        """Of the healed child; the parent's answers are kept for all."""
        name = self.name(speed, method)
        asked = (
            "--tasks",
            names,
            "--task-data",
            task_data,
            "--answers",
            self.work / f"answers-{os.getpid()}.jsonl",
            "--run-code",
        )
        healed = self.work / f"healed{self.tag}" / name
        self.once(f"tasks{self.tag}/{name}", "evaluate", self.recipe["parent"], healed, *asked)

    def steps(self, speed: float, between: float) -> None:
        out, total = self.work / "steps" / f"{speed:g}", float(self.recipe["heal"]["tokens"])
        if not out.is_dir():  # the first library and its costs are there
            partial = out.with_name(f"{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(self.base / "library", partial / "step-1" / "library", copy_function=os.link)
            shutil.copy(self.base / "stages.json", partial / "step-1")
            (partial / "stages.json").write_text('{"schema": 1, "stages": {}}')
            partial.rename(out)
        heal = self.recipe["heal"] | {"tokens": total - between}
        steps = [{"goal": {"throughput": f"{speed**0.5:.4g}x"}, "heal": {"tokens": between}}]
        recipe = self.written(f"steps-{speed:g}", goal=self.goal(speed), steps=steps, heal=heal, export="hf")
        self.once(f"ran/steps-{speed:g}", "run", recipe, *self.data, "--out", out)
        self.measure(speed, "steps", out / "child")
        self.after(f"steps-{speed:g}", out / "healed")

    def kept(self, name: str) -> dict[str, Any] | None:
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def row(self, speed: float, method: str) -> dict[str, Any] | None:
        """What is known of a child; None: nothing."""
        ran, road = self.kept(f"ran/steps-{speed:g}"), self.kept("library")
        stepped = method == "steps"
        chosen = ran if stepped else self.kept(f"chosen/{method}-{speed:g}")
        if chosen is None or road is None:
            return None
        place = self.work / "steps" / f"{speed:g}" / "solution" if stepped else self.solution(speed, method)
        solved, name = read_architecture(place), f"steps-{speed:g}" if stepped else self.name(speed, method)
        first, spent = road["said"]["seconds"], chosen["seconds"]
        heal, own = (
            self.kept(f"heal{self.tag}/{name}"),
            {"library_s": first["build-library"] + first["score"], "choose_s": spent},
        )
        if stepped:
            taken = chosen["said"]["seconds"]
            healing, libraries = (
                sum(s for n, s in taken.items() if n.endswith(ends)) for ends in ("heal", ("build-library", "score"))
            )
            own = {
                "library_s": own["library_s"] + libraries,
                "choose_s": taken["solve"] + taken["step 1 solve"],
                "heal_s": healing,
            }
        elif heal is not None:
            own |= {"heal_s": heal["seconds"]}
        mip = self.solution(speed, "mip")
        found = {"speed": speed, "method": method, "promised": solved.speedup, "sum_of_scores": solved.objective, **own}
        if (mip / "architecture.json").is_file():
            other = read_architecture(mip)
            found["changed"] = sum(a != b for a, b in zip(solved.sub_blocks, other.sub_blocks, strict=True))
        if (benched := self.kept(f"bench/{method}-{speed:g}")) is not None:
            found["measured"] = benched["said"]["speedup"]["measured"]
        if (answered := self.kept(f"tasks{self.tag}/{name}")) is not None:
            found["tasks"] = "; ".join(
                f"{task} {who} {each[who]['mean']:.4f} [{each[who]['low']:.4f}, {each[who]['high']:.4f}]"
                for task, one in answered["said"]["tasks"].items()
                for each in one["metrics"].values()
                for who in each
            )
        for kind, ends in (("before", ""), (f"after{self.tag}", "_healed")):
            if (measured := self.kept(f"{kind}/{name}")) is not None:
                said = measured["said"]
                found |= {f"kl{ends}": said["child"]["kl"], f"kl{ends}_stderr": said["child"]["kl_stderr"]}
                found |= {
                    f"loss{ends}": said["child"]["loss"],
                    "parent_loss": said["parent"]["loss"],
                    "device": said["device"],
                }
                if ends:
                    found["healed_tokens"] = int(float(self.recipe["heal"]["tokens"]))
        return found


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("parts", nargs=-1, required=True, type=click.Choice(PARTS))
@click.option("--parent", help="In place of the recipe's.")
@click.option("--data", required=True, multiple=True)
@click.option("--speeds", default="1.5,2", show_default=True)
@click.option("--methods", default="mip,finalists,pairs,rescored,all", show_default=True)
@click.option("--finalists", type=int, default=16, show_default=True)
@click.option("--min-distance", type=int, default=2, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--chosen-on", type=int, default=64, show_default=True, help="Sequences that children are measured on.")
@click.option("--sequences", type=int, default=512, show_default=True, help="That all are compared on.")
@click.option(
    "--between", type=float, default=3e6, show_default=True, help="Of the recipe's healing: tokens between steps."
)
@click.option("--tokens", type=float, help="Of the healing, in place of the recipe's.")
@click.option("--task-data", type=click.Path(path_type=Path), help="For the part `tasks`.")
@click.option("--tasks", default="hellaswag,truthfulqa_mc1,humaneval", show_default=True)
@click.option("--minutes", type=float, default=8.8, show_default=True)
@click.option("--longest", type=float, default=20, show_default=True, help="With fewer seconds left nothing is begun.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(recipe: Path, parts: tuple[str, ...], parent: str | None, data: tuple[str, ...], speeds: str, methods: str, finalists: int, min_distance: int, rounds: int, chosen_on: int, sequences: int, between: float, tokens: float | None, task_data: Path | None, tasks: str, minutes: float, longest: float, work: Path, out: Path) -> None:  # fmt: skip
    value = yaml.safe_load(recipe.read_text())
    value["parent"] = str(Path(parent).resolve() if parent else (recipe.parent / value["parent"]).resolve())
    bench, every = (
        Bench(value, work.resolve(), data, sequences, 60 * minutes, longest),
        [float(s) for s in speeds.split(",")],
    )
    measured, several = ["--sequences", chosen_on], ["--finalists", finalists, "--min-distance", min_distance]
    flags: dict[str, list[object]] = {
        "mip": [],
        "finalists": [*measured, *several],
        "pairs": [*measured, *several, "--pairs"],
        "rescored": [*measured, "--rounds", rounds],
        "all": [*measured, *several, "--pairs", "--rounds", rounds],
        **{name: ["--baseline", name] for name in BASELINES},
    }
    if tokens is not None:
        value["heal"]["tokens"], bench.tag = tokens, f"-{tokens:g}"
    asked = methods.split(",")
    try:
        for part in parts:
            if part == "library":
                bench.library(every[-1])
            for speed in every:
                if part == "steps":
                    bench.steps(speed, between)
                for method in asked if part not in ("library", "steps", "table") else ():
                    if part == "choose":
                        bench.choose(speed, method, flags[method])
                    elif part == "tasks":
                        assert task_data is not None, "--task-data"
                        bench.tasks(speed, method, task_data, tasks)
                    else:
                        bench.bench(speed, method) if part == "bench" else bench.heal(speed, method)
    except OutOfTime:
        print("out of time: run the same command again, it goes on from here")
    found = [bench.row(speed, method) for speed in every for method in (*asked, "steps")]
    with open(out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in found:
            if row is not None:
                told = {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()}
                writer.writerow(told | {"date": time.strftime("%Y-%m-%d")})
                print(*told.values())


if __name__ == "__main__":
    main()
