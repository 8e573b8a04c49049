"""Does vLLM keep what `puzzle solve --engine vllm` promises? Parent and three children at 64 sequences, 1024/256, random weights.

Three steps, each resumable: what stands in WORK is not done again.

    profile   `puzzle profile --engine vllm --run` of every row of SHAPES: on the GPU
    solve     children of 1.5, 2 and 3 times the parent at 64 sequences with made-up scores (`synthetic_library.py`), of the 70B shapes
              one of 70 % of the parameters: anywhere, needs OR-Tools
    bench     `puzzle bench --engine vllm` of all of them, through the plug-in and, in bf16, as nemotron-nas too: on the GPU

    export PYTHONPATH=$PWD:SITE_OF_VLLM
    python benchmarks/serving/bench_promise.py profile --work work --minutes 8 --pack $OUT/work.tar.gz     (again until it says done)
    python benchmarks/serving/bench_promise.py solve --work work
    python benchmarks/serving/bench_promise.py bench --work work --minutes 8 --pack $OUT/work.tar.gz       (again until it says done)
    python benchmarks/serving/bench_promise.py table --work work --out benchmarks/results/engine_promise.csv

A call ends after --minutes, with what it was measuring lost (a point, or one bench). --pack writes WORK into one file at the end, and
--unpack reads it first. The rehearsal, on vLLM's CPU build at the reference parent's shapes, takes a quarter of an hour:

    OMP_NUM_THREADS=1 python benchmarks/serving/bench_promise.py profile solve bench table --gpu cpu --work work --minutes 30 \\
        --python .engines/vllm/bin/python --out work/promise.csv
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

LIBRARY_SCRIPT = Path(__file__).resolve().parents[1] / "lib" / "synthetic_library.py"
FFN = "none,0.75,0.5,0.25,0.1"
KV_HEADS = "kv4,kv2,kv1,none"
STEPS = ("profile", "solve", "bench", "table")
GOALS = ("1.5x", "2x", "3x")
LEAST = 75  # seconds left without which no bench is started
COLUMNS = (
    "shapes", "precision", "model", "format", "lowered", "batch", "what", "promised", "measured", "measured_over_promised", "versions",
    "device", "date",
)  # fmt: skip
COMPARED = ("tokens_per_second", "ttft_seconds", "tpot_seconds", "memory_bytes", "cached_tokens")


@dataclass(frozen=True)
class Shapes:
    """goals: a child for each, named by it, and what asks `solve` for it. attention: what its library offers, from which `kv` names
    it where another one has the same shapes."""

    name: str
    fp8: bool
    goals: tuple[tuple[str, tuple[str, ...]], ...]
    decilm: tuple[str, ...] = ()  # children that are measured as nemotron-nas too
    attention: str = KV_HEADS
    kv: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}-fp8" if self.fp8 else self.name


FASTER = tuple((goal, ("--throughput", goal)) for goal in GOALS)
SHAPES = (
    Shapes("llama-3.1-8b", False, FASTER, ("1.5x", "2x")),
    Shapes(
        "llama-3.1-8b", False, FASTER[:1], ("1.5x",), attention="none", kv="-kv8"
    ),  # which vLLM before 0.29 reads rightly in both
    Shapes("llama-3.1-8b", True, FASTER),
    Shapes("llama-3.3-70b", True, (("70%", ("--params", "70%")),)),
    Shapes("smollm2-135m", False, (("2x", ("--throughput", "2x")),)),
)
TINY = (Shapes("reference", False, FASTER[:2], ("1.5x",)), Shapes("reference", True, FASTER[:1]))
WORKLOADS = {"cpu": ("64", "32", "8"), "": ("1024", "256", "64")}  # prompt, answer, sequences


@dataclass
class Run:
    work: Path
    gpu: str
    python: Path | None
    end: float
    only: tuple[str, ...] = ()

    @property
    def shapes(self) -> tuple[Shapes, ...]:
        return tuple(one for one in (TINY if self.gpu == "cpu" else SHAPES) if not self.only or one.key in self.only)

    @property
    def engine(self) -> list[str]:
        own = [] if self.python is None else ["--python", str(self.python)]
        return ["--engine", "vllm", "--gpu", self.gpu, *own]

    def puzzle(self, *arguments: object) -> str | None:
        """What the verb printed; None where it failed or the time was up."""
        command = [sys.executable, "-m", "puzzle", *map(str, arguments)]
        print(f"[{self.end - time.monotonic():.0f} s left] puzzle {' '.join(command[3:])}", flush=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            said, _ = process.communicate(timeout=max(1.0, self.end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the engine with it
            process.wait()
            print("the time is up: call again", flush=True)
            return None
        return said if process.returncode == 0 else None

    def profile(self) -> bool:
        done = True
        for one in self.shapes:
            folder = self.work / "costs" / self.gpu / "vllm" / one.key
            if not (folder / "fit.json").is_file():
                more = ["--fp8"] if one.fp8 else []
                asked = ("--shapes", one.name, *self.engine, "--run", *more, "--out", self.work / "costs", "--json")
                done = self.puzzle("profile", *asked) is not None and done
            if time.monotonic() > self.end:
                return False
        return done

    def library(self, one: Shapes) -> Path:
        """With made-up scores and the fits that were measured."""
        path = self.work / "libraries" / (one.name + one.kv)
        if not (path / "library.json").is_file():
            offered = ("--attention", one.attention, "--ffn", FFN)
            subprocess.run([sys.executable, LIBRARY_SCRIPT, one.name, path, *offered], check=True)
            (path / "costs").symlink_to((self.work / "costs").absolute())
        return path

    def solution(self, one: Shapes, child: str) -> Path:
        return self.work / "children" / f"{one.key}{one.kv}-{child.replace('%', 'percent')}" / "architecture.json"

    def solve(self) -> bool:
        prompt, answer, sequences = WORKLOADS.get(self.gpu, WORKLOADS[""])
        work = ("--input-len", prompt, "--output-len", answer, "--concurrency", sequences)
        for one in self.shapes:
            for child, goal in one.goals:
                out = self.solution(one, child)
                if not out.is_file():
                    asked = (*goal, *work, "--engine", "vllm", "--gpu", self.gpu, "--shapes", one.key)
                    if self.puzzle("solve", self.library(one), *asked, "--out", out.parent, "--json") is None:
                        return False
        return True

    def bench(self) -> bool:
        done = True
        for one in self.shapes:
            for format in ("hf", "nemotron-nas"):
                children = [child for child, _ in one.goals if format == "hf" or child in one.decilm]
                for child in children:
                    out = self.work / "bench" / f"{self.solution(one, child).parent.name}-{format}.json"
                    parent = ["--with-parent"] if child == children[0] and "70b" not in one.name and not one.kv else []
                    if out.is_file():
                        continue
                    if self.end - time.monotonic() < LEAST:
                        return False
                    repeats = 3 if one.kv else 1  # of what is compared with another reader
                    asked = (*self.engine, "--format", format, "--repeats", repeats, *parent, "--json")
                    said = self.puzzle("bench", self.solution(one, child), *asked)
                    if said is None:
                        done = False
                        continue
                    found = json.loads(said) | {"shapes": one.name, "name": child + one.kv, "format": format}
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(json.dumps(found | {"date": time.strftime("%Y-%m-%d")}))
                    for row in rows_of(found | {"date": ""}, lowered=""):
                        print("  ", *(row[name] for name in COLUMNS[:10]), flush=True)
        return done

    def table(self, out: Path) -> bool:
        rows: list[dict[str, Any]] = []
        for path in sorted((self.work / "bench").glob("*.json")):
            found = json.loads(path.read_text())
            solved = path.name.removesuffix(f"-{found['format']}.json")
            layers = json.loads((self.work / "children" / solved / "architecture.json").read_text())["layers"]
            kinds = [choice["sub_block"].split()[0] for layer in layers for choice in layer.values()]
            changed = "linear" in kinds or layers[0]["attention"]["sub_block"].startswith("none")
            rows += rows_of(found, lowered="yes" if changed and found["format"] != "hf" else "")
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {out}: {len(rows)} rows")
        return True


def rows_of(found: dict[str, Any], lowered: str) -> list[dict[str, Any]]:
    """One per model and figure."""
    rows = []
    for who in ("parent", "child"):
        if who not in found:
            continue
        measured, promised = found[who]["measured"], found[who]["predicted"] or {}
        for what in COMPARED:
            ours, theirs = measured[what], promised.get(what)
            rows.append(
                {
                    "shapes": found["shapes"],
                    "precision": found["precision"],
                    "model": found["name"] if who == "child" else "parent",
                    "format": found["format"],
                    "lowered": lowered if who == "child" else "",
                    "batch": measured["batch"],
                    "what": what,
                    "promised": "" if theirs is None else f"{theirs:.6g}",
                    "measured": "" if ours is None else f"{ours:.6g}",
                    "measured_over_promised": f"{ours / theirs:.4f}" if ours and theirs else "",
                    "versions": measured["versions"],
                    "device": measured["device"],
                    "date": found["date"],
                }
            )
    return rows


@click.command()
@click.argument("steps", nargs=-1, required=True, type=click.Choice(STEPS))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--gpu", default="h100", help="cpu: the rehearsal, at the reference parent's shapes.")
@click.option("--python", type=click.Path(path_type=Path), help="Of vLLM's environment, where it is not this one.")
@click.option("--only", multiple=True, help="Of these shapes alone, as llama-3.1-8b-fp8: several GPUs share WORK.")
@click.option("--minutes", type=float, default=8.0, help="After which a call ends.")
@click.option("--unpack", type=click.Path(path_type=Path), help="A packed WORK to go on from, if it is there.")
@click.option("--pack", type=click.Path(path_type=Path), help="Where WORK goes as one file at the end.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("engine_promise.csv"), help="Of the table.")
def main(
    steps: tuple[str, ...], work: Path, gpu: str, python: Path | None, only: tuple[str, ...], minutes: float, unpack: Path | None,
    pack: Path | None, out: Path,
) -> None:  # fmt: skip
    if unpack is not None and unpack.is_file():
        with tarfile.open(unpack) as archive:
            archive.extractall(work, filter="data")
    work.mkdir(parents=True, exist_ok=True)
    run = Run(work, gpu, python, time.monotonic() + 60 * minutes, only)
    try:
        for step in steps:
            done = run.table(out) if step == "table" else getattr(run, step)()
            print(f"{step}: {'done' if done else 'not done, call again'}", flush=True)
            if not done:
                sys.exit(1)
    finally:
        if pack is not None:
            with tarfile.open(pack, "w:gz") as archive:
                for name in ("costs", "children", "bench"):
                    if (work / name).is_dir():
                        archive.add(work / name, name)


if __name__ == "__main__":
    main()
