"""What is left, after healing, of what choosing by measured divergence buys, beside simple rules and a road in steps.

Protocol: one library and one cost table, of RECIPE without its healing. At every speed-up, by `solve`: the additive MIP (`mip`), the best
of finalists (`finalists`), with interactions (`pairs`), after new scores around the MIP's child (`rescored`), around the best of
finalists and pairs (`all`). Each in a copy of the library, so that none is spared what another one has measured. Then `steps`: half of
the speed-up first (its square root), healed on --between tokens, and the rest from there. All meet the same limit at the same prices and
are healed on as many tokens as RECIPE (or --tokens) says, those between the steps among them. `depth`, `uniform`, `uniform-width`, `greedy` and
`random` are `solve --baseline`, at the same limit. KL(parent‖child) and loss on --sequences of held-out text, the first of which the choices have
seen (`measure`), and how much more it is than of the MIP's child, sequence by sequence (`over_mip`); `measured` is the speed of `bench` over
that of the parent, `choose_s` what choosing takes beyond library and scores, which `library_s` has; with --task-data the shares of right
answers of parent and child in each task, healed (`tasks`) and not (`tasks-before`).

    python benchmarks/quality/bench_chosen.py examples/smollm2_h100.yaml library choose steps measure heal --parent MODEL --data DATA \\
        --work WORK --out benchmarks/results/chosen.csv

What is in WORK is not done again; nothing runs longer than --minutes in all: the same command goes on. GPUs, and several such commands
on one of them, may share WORK once the library is there: each takes what no other is at. What is told in seconds runs alone on its GPU:
the healing of `steps`, but of no other, which takes as many tokens. What fails is told and left out. `table` alone writes the rows of all
that is in WORK. Rehearsal on a CPU:

    python benchmarks/quality/bench_chosen.py examples/quickstart.yaml library choose steps measure heal --data /usr/lib/python3.11 \\
        --work WORK --out chosen.csv --speeds 1.3 --finalists 4 --rounds 1 --sequences 8 --chosen-on 4 --between 8192
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from forked_puzzle import begin_imports, run_puzzle
from puzzle.base.files import content_hash
from puzzle.measure.architecture import read_architecture

PARTS = ("library", "choose", "steps", "measure", "bench", "heal", "tasks", "tasks-before", "table")
BASELINES = ("depth", "uniform", "uniform-width", "greedy", "random")
COLUMNS = ("speed", "method", "promised", "measured", "sum_of_scores", "choose_s", "library_s", "heal_s", "healed_tokens", "kl", "kl_stderr",
           "loss", "kl_healed", "kl_healed_stderr", "loss_healed", "parent_loss", "kl_over_mip", "kl_over_mip_stderr", "kl_healed_over_mip",
           "kl_healed_over_mip_stderr", "tasks_before", "tasks", "changed", "device", "date")  # fmt: skip


COSTS = (
    "library",
    "chosen/",
    "ran/",
)  # of choosing; all else begins as a fork, for most of what it takes by itself is importing
ALONE = (*COSTS, "bench/")  # whose seconds or speeds count: nothing else is on the GPU meanwhile


class OutOfTime(Exception):
    pass


class Waits(Exception):
    """Another process is at it, or at what it needs (`held`); else what it needs is not there."""

    def __init__(self, held: bool):
        self.held = held


class Bench:
    def __init__(
        self, recipe: dict[str, Any], work: Path, data: tuple[str, ...], sequences: int, seconds: float, longest: float
    ):
        self.recipe, self.work, self.sequences, self.until = recipe, work, sequences, time.monotonic() + seconds
        self.gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "any")
        self.longest, self.tag = longest, ""  # tag: of what depends on the tokens of the healing
        self.ran, self.claims = 0, set[str]()  # what was run here; what other processes are kept from
        self.data = [word for one in data for word in ("--data", one)]
        self.base = work / "base" / "0" / "step-1"  # as deep as a step of a run, to which its parent is on the same way
        (work / "claims").mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[None]:
        """Keep other processes from `name` for as long as this one lives and is at it. Raises Waits where another one is."""
        if name in self.claims:
            yield
            return
        with open(self.work / "claims" / name.replace("/", " "), "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Waits(held=True) from None
            self.claims.add(name)
            try:
                yield
            finally:
                self.claims.discard(name)

    @contextlib.contextmanager
    def on_gpu(self, alone: bool) -> Iterator[None]:
        """Beside others, or alone: who waits for that stands at the gate, so that nobody else comes in before."""
        claims = self.work / "claims"
        with open(claims / f"gate of {self.gpu}", "w") as gate, open(claims / f"on {self.gpu}", "w") as floor:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(floor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield

    def need(self, name: str) -> None:
        if self.kept(name) is None:
            with self.claim(name):
                raise Waits(held=False)

    def once(self, name: str, *arguments: object) -> dict[str, Any]:
        """What a verb printed, now or earlier, and its seconds, those of calls that were cut off among them."""
        if (found := self.kept(name)) is not None:
            return found
        gpu = contextlib.nullcontext() if name.startswith("exported/") else self.on_gpu(name.startswith(ALONE))
        with self.claim(name), gpu:
            return self.kept(name) or self.run(name, arguments)

    def run(self, name: str, arguments: tuple[object, ...]) -> dict[str, Any]:
        path, spent = self.work / f"{name}.json", self.work / f"{name}.spent"
        left, before = self.until - time.monotonic(), float(spent.read_text()) if spent.is_file() else 0.0
        if left < self.longest:
            raise OutOfTime
        path.parent.mkdir(parents=True, exist_ok=True)
        begin, words = time.monotonic(), [*map(str, arguments), "--json"]
        try:
            said = (whole_puzzle if name.startswith(COSTS) else run_puzzle)(words, left)
        except subprocess.TimeoutExpired as error:
            raise OutOfTime from error
        finally:
            seconds = before + time.monotonic() - begin
            spent.write_text(str(seconds))
        found = {"said": json.loads(said), "seconds": seconds}
        write_whole(path, json.dumps(found))
        self.ran += 1
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
        with self.claim(f"chosen/{method}-{speed:g}"):
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
                f"chosen/{method}-{speed:g}",
                "solve",
                copy,
                *asked,
                *flags,
                *text,
                "--out",
                self.solution(speed, method),
            )

    def flags(self, values: dict[str, Any]) -> list[object]:
        return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]

    def solution(self, speed: float, method: str) -> Path:
        return self.work / "chosen" / f"{method}-{speed:g}"

    def name(self, speed: float, method: str) -> str:
        """Of a child: those that are alike are one. Raises Waits where it is not chosen yet."""
        self.need(f"chosen/{method}-{speed:g}")
        return content_hash(read_architecture(self.solution(speed, method)).variants)[:16]

    def measure(self, speed: float, method: str) -> None:
        if method != "steps":
            child, of_library = self.solution(speed, method), ("--library", self.base / "library")
            self.evaluate(f"before/{self.name(speed, method)}", child, *of_library)
            return
        name, out = self.stepped(speed)
        self.need(f"ran/{name}")
        self.evaluate(f"before/{name}", out / "child")
        self.evaluate(f"after{self.tag}/{name}", out / "healed")

    def evaluate(self, name: str, child: Path, *more: object) -> None:
        asked = ("--sequences", self.sequences, "--seq-len", self.recipe["evaluate"].get("seq_len", 1024), "--no-speed")
        self.once(name, "evaluate", self.recipe["parent"], child, *more, *self.data, *asked)

    def heal(self, speed: float, method: str) -> None:
        name = self.name(speed, method)
        child, healed = self.work / "children" / name, self.work / f"healed{self.tag}" / name
        self.export(speed, method)
        asked = ("--teacher", self.recipe["parent"], *self.data, *self.flags(self.recipe["heal"]))
        self.once(f"heal{self.tag}/{name}", "heal", child, *asked, "--out", healed)
        self.evaluate(f"after{self.tag}/{name}", healed)

    def export(self, speed: float, method: str) -> None:
        name = self.name(speed, method)
        child = self.work / "children" / name
        self.once(f"exported/{name}", "export", self.base / "library", self.solution(speed, method), "--out", child)

    def bench(self, speed: float, method: str) -> None:
        if method == "steps":
            name, out = self.stepped(speed)
            solution = out / "solution"
            self.need(f"ran/{name}")
        else:
            name, solution = self.name(speed, method), self.solution(speed, method)
        self.once(f"bench/{name}", "bench", solution, "--gpu", self.recipe["profile"]["gpu"], "--with-parent")

    def tasks(self, speed: float, method: str, healed: bool, asked: list[object]) -> None:
        """Of the child; the parent's answers are kept for all that this process asks."""
        name = self.name(speed, method)
        if healed:
            self.need(f"heal{self.tag}/{name}")
            kind, child = f"tasks{self.tag}", self.work / f"healed{self.tag}" / name
        else:
            self.export(speed, method)
            kind, child = "tasks-before", self.work / "children" / name
        for number in range(64):  # one writes to a file of answers at a time
            with contextlib.suppress(Waits), self.claim(f"answers-{number}"):
                answers = self.work / f"answers-{number}.jsonl"
                self.once(f"{kind}/{name}", "evaluate", self.recipe["parent"], child, *asked, "--answers", answers)
                return
        raise Waits(held=True)

    def stepped(self, speed: float) -> tuple[str, Path]:
        """Name and place of the road in steps, whose children depend on the tokens of the healing between them."""
        return f"steps{self.tag}-{speed:g}", self.work / f"steps{self.tag}" / f"{speed:g}"

    def steps(self, speed: float, between: float) -> None:
        name, out = self.stepped(speed)
        with self.claim(f"ran/{name}"):
            total = float(self.recipe["heal"]["tokens"])
            if not out.is_dir():  # the first library and its costs are there
                partial = out.with_name(f"{out.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self.base / "library", partial / "step-1" / "library", copy_function=os.link)
                shutil.copy(self.base / "stages.json", partial / "step-1")
                (partial / "stages.json").write_text('{"schema": 1, "stages": {}}')
                partial.rename(out)
            heal = self.recipe["heal"] | {"tokens": total - between}
            steps = [{"goal": {"throughput": f"{speed**0.5:.4g}x"}, "heal": {"tokens": between}}]
            recipe = self.written(name, goal=self.goal(speed), steps=steps, heal=heal, export="hf")
            self.once(f"ran/{name}", "run", recipe, *self.data, "--out", out)

    def kept(self, name: str) -> dict[str, Any] | None:
        path = self.work / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def row(self, speed: float, method: str) -> dict[str, Any] | None:
        """What is known of a child; None: nothing."""
        name, out = self.stepped(speed)
        stepped, road = method == "steps", self.kept("library")
        chosen = self.kept(f"ran/{name}" if stepped else f"chosen/{method}-{speed:g}")
        if chosen is None or road is None:
            return None
        if not stepped:
            name = self.name(speed, method)
        solved = read_architecture(out / "solution" if stepped else self.solution(speed, method))
        first, spent = road["said"]["seconds"], chosen["seconds"]
        own = {"library_s": first["build-library"] + first["score"], "choose_s": spent}
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
        mip = self.solution(speed, "mip")
        found = {"speed": speed, "method": method, "promised": solved.speedup, "sum_of_scores": solved.objective, **own}
        if (mip / "architecture.json").is_file():
            other = read_architecture(mip)
            found["changed"] = sum(a != b for a, b in zip(solved.sub_blocks, other.sub_blocks, strict=True))
        if (benched := self.kept(f"bench/{name}")) is not None:
            found["measured"] = benched["said"]["speedup"]["measured"]
        for column, kind in (("tasks_before", "tasks-before"), ("tasks", f"tasks{self.tag}")):
            if (answered := self.kept(f"{kind}/{name}")) is not None:
                found[column] = "; ".join(
                    f"{task} {metric} {who} {one['mean']:.4f} [{one['low']:.4f}, {one['high']:.4f}]"
                    for task, all_of in answered["said"]["tasks"].items()
                    for metric, each in all_of["metrics"].items()
                    for who, one in (each | {"difference": all_of["differences"]["child - parent"][metric]}).items()
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
                if (over := self.over_mip(kind, name, speed)) is not None:
                    found |= {f"kl{ends}_over_mip": over[0], f"kl{ends}_over_mip_stderr": over[1]}
                if ends:
                    found["healed_tokens"] = int(float(self.recipe["heal"]["tokens"]))
        return found

    def over_mip(self, kind: str, name: str, speed: float) -> tuple[float, float] | None:
        """The mean over sequences of the KL less that of the MIP's child, and its error. None: one of them is not measured, or was before
        each sequence was kept, or it is the MIP's child."""
        if self.kept(f"chosen/mip-{speed:g}") is None or (mip := self.name(speed, "mip")) == name:
            return None
        measured = [self.kept(f"{kind}/{one}") for one in (name, mip)]
        mine, base = (None if m is None else m["said"]["child"].get("kl_of_sequences") for m in measured)
        if mine is None or base is None:
            return None
        differences = [a - b for a, b in zip(mine, base, strict=True)]
        return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5

    def table(self, out: Path, speeds: list[float], methods: list[str]) -> None:
        """All that is known of these methods, as OUT: at other speeds too, for which earlier calls have chosen."""
        there = {float(path.stem.rpartition("-")[2]) for path in self.work.glob("chosen/*.json")}
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for speed in sorted({*speeds, *there}):
            for row in (self.row(speed, method) for method in (*methods, "steps")):
                if row is not None:
                    told = {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()}
                    writer.writerow(told | {"date": time.strftime("%Y-%m-%d")})
        write_whole(out, text.getvalue())


def whole_puzzle(words: list[str], seconds: float) -> str:
    """As `run_puzzle`, from nothing."""
    command = [sys.executable, "-m", "puzzle", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=seconds).stdout


def write_whole(path: Path, text: str) -> None:
    """At once: other processes read it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


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
@click.option("--tasks", default="hellaswag,truthfulqa_mc1,humaneval,gsm8k", show_default=True)
@click.option("--task-methods", help="Whose children they are asked of. Default: all of --methods.")
@click.option("--task-limit", type=int, help="The first documents of each task. Default: all.")
@click.option("--minutes", type=float, default=8.8, show_default=True)
@click.option("--longest", type=float, default=20, show_default=True, help="With fewer seconds left nothing is begun.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(recipe: Path, parts: tuple[str, ...], parent: str | None, data: tuple[str, ...], speeds: str, methods: str, finalists: int, min_distance: int, rounds: int, chosen_on: int, sequences: int, between: float, tokens: float | None, task_data: Path | None, tasks: str, task_methods: str | None, task_limit: int | None, minutes: float, longest: float, work: Path, out: Path) -> None:  # fmt: skip
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
    chosen = methods.split(",")
    questions: list[object] = ["--tasks", tasks, "--task-data", task_data, "--run-code"]
    questions += [] if task_limit is None else ["--limit", task_limit]
    if task_data is None and any(part.startswith("tasks") for part in parts):
        raise click.UsageError("the part `tasks` needs --task-data")

    def do(part: str, speed: float, method: str) -> None:
        if part == "library":
            bench.library(speed)
        elif part == "steps":
            bench.steps(speed, between)
        elif part == "choose":
            bench.choose(speed, method, flags[method])
        elif part == "measure":
            bench.measure(speed, method)
        elif part == "bench":
            bench.bench(speed, method)
        elif part == "heal":
            bench.heal(speed, method)
        else:
            bench.tasks(speed, method, part == "tasks", questions)

    if set(parts) - {"library", "choose", "steps", "table"}:
        begin_imports()  # else its seconds would count while nothing else may be on the GPU
    wanted: list[tuple[str, float, str]] = []
    for part in parts:
        if part == "library":
            wanted.append((part, every[-1], ""))
        elif part == "steps":
            wanted += [(part, speed, "") for speed in every]
        elif part != "table":
            asked = task_methods.split(",") if task_methods and part.startswith("tasks") else chosen
            wanted += [(part, speed, method) for speed in every for method in asked]
        if part in ("measure", "bench"):
            stepped = [s for s in every if "steps" in parts or bench.kept(f"ran/{bench.stepped(s)[0]}")]
            wanted += [(part, speed, "steps") for speed in stepped]
    failed, before = list[str](), -1
    try:
        while wanted:
            waiting, held = [], False
            for one in wanted:
                try:
                    do(*one)
                except Waits as waits:
                    waiting.append(one)
                    held |= waits.held
                except subprocess.CalledProcessError as error:
                    failed.append(f"{' '.join(map(str, one))}: exit {error.returncode}")
                    print(f"failed: {failed[-1]}", flush=True)
                    if one[0] == "library":
                        raise click.ClickException("nothing goes on without the library") from error
                if bench.ran != before:
                    before = bench.ran
                    bench.table(out, every, chosen)
            if waiting and not held and waiting == wanted:
                failed += [f"{' '.join(map(str, one))}: what it needs is not there" for one in waiting]
                break
            wanted = waiting
            if waiting and held:
                time.sleep(1)
                if time.monotonic() > bench.until - longest:
                    raise OutOfTime
    except OutOfTime:
        print("out of time: run the same command again, it goes on from here")
    bench.table(out, every, chosen)
    print(out.read_text(encoding="utf-8"))
    if failed:
        raise click.ClickException("; ".join(failed))


if __name__ == "__main__":
    main()
