"""Does another commit build, choose and export the same, bit for bit?

    python benchmarks/quality/same_bits.py --before ca70475 [--work DIR]

Protocol: two checkouts (`git worktree` of the commit, and this tree) run the same commands on the CPU, with one thread and
in one environment: a library of the reference parent from 46 files of the standard library (16,384 tokens, 8 held-out
sequences) and one without windows, ten goals on the shipped H100 costs, and three of the children in each format. Compared are
every tensor of every block, every number of every score, the variant of every layer and slot, and the bytes of every
exported .safetensors and .gguf file. Goals with a limit of memory, latency or parameters beside are left out: since batches between
those measured are candidates, they have better answers than at ca70475. Prints a line per comparison and exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
BUILD = "--seq-len 128 --batch-size 4 --calibration-sequences 8 --validation-sequences 4 --score-sequences 8"
LIBRARIES = {"trained": "--tokens 16384", "windowless": "--tokens 0 --attention kv2,kv1,linear,none"}
GOALS = {
    "2x": "--throughput 2x",
    "3x": "--throughput 3x",
    "1.5x": "--throughput 1.5x",
    "1.25x": "--throughput 1.25x",
    "pinned": "--throughput 1.5x --pin 0-1",
    "attention": "--throughput 2x --keep-attention 10",
    "also": "--throughput 1.5x --also 256/16@1:ttft=90%",
    "fusion": "--throughput 1.8x --fusion",
    "vllm": "--throughput 1.25x --engine vllm",
    "stages": "--throughput 1.5x --stages 4 --stage-tolerance 20%",
}
FORMATS = {"hf": "", "nemotron-nas": "--format nemotron-nas", "gguf": "--format gguf"}
EXPORTED = ("2x", "3x", "1.5x")


def puzzle(checkout: Path, *arguments: object) -> None:
    """`python -m puzzle.cli ...` in a checkout; its own packages come first. Ends the script where it fails."""
    command = [sys.executable, "-m", "puzzle.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {checkout} failed:\n{done.stderr}")


def make(checkout: Path, corpus: Path, out: Path) -> None:
    """All artefacts of one checkout; what exists is kept."""
    parent = ROOT / "examples/parent"
    for name, options in LIBRARIES.items():
        if not (out / f"{name}.built").is_file():
            words = f"{BUILD} {options}".split()
            puzzle(checkout, "build-library", parent, "--data", corpus, "--out", out / name, *words)
            (out / f"{name}.built").touch()
        for goal, limits in GOALS.items():
            solution = out / "solutions" / name / goal
            if not (solution / "architecture.json").is_file():
                shapes = "" if "--engine" in limits else "--shapes reference"
                words = f"{limits} --gpu h100 {shapes} --input-len 128 --output-len 128".split()
                puzzle(checkout, "solve", out / name, *words, "--out", solution)
    for goal in EXPORTED:
        for format, options in FORMATS.items():
            library = "trained" if format == "hf" else "windowless"  # readers of the other two know no windows
            child = out / "children" / f"{goal}-{format}"
            if not child.exists():
                solution = out / "solutions" / library / goal
                puzzle(checkout, "export", out / library, solution, "--out", child, *options.split())


def blocks(side: Path) -> dict[str, Path]:
    return {
        str(path.relative_to(side)): path
        for name in LIBRARIES
        for path in sorted((side / name / "blocks").rglob("*.safetensors"))
    }


def same_blocks(before: Path, after: Path) -> tuple[bool, str]:
    ours, theirs = blocks(after), blocks(before)
    num_tensors, different = 0, sorted(set(ours) ^ set(theirs))
    for name in sorted(set(ours) & set(theirs)):
        a, b = load_file(theirs[name]), load_file(ours[name])
        num_tensors += len(a)
        equal = a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
        different += [] if equal else [name]
    return not different and num_tensors > 0, f"{len(theirs)} blocks, {num_tensors} tensors" + told(different)


def same_scores(before: Path, after: Path) -> tuple[bool, str]:
    numbers, different = 0, []
    for path in sorted(before.glob("*/scores/*.json")):
        other = after / path.relative_to(before)
        a, b = (json.loads(p.read_text())["scores"] if p.is_file() else {} for p in (path, other))
        numbers += sum(len(score) for score in a.values())
        different += [f"{path.stem} {name}" for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return not different and numbers > 0, f"{numbers} numbers" + told(different)


def chosen(path: Path) -> list[dict[str, str]]:
    """The variant of every layer and slot, whichever schema tells it."""

    def name(value: Any) -> str:
        return value if isinstance(value, str) else value["variant"]

    return [{slot: name(value) for slot, value in layer.items()} for layer in json.loads(path.read_text())["layers"]]


def same_architectures(before: Path, after: Path) -> tuple[bool, str]:
    files = [f"solutions/{name}/{goal}/architecture.json" for name in LIBRARIES for goal in GOALS]
    different = [file for file in files if chosen(before / file) != chosen(after / file)]
    kinds = len({json.dumps(chosen(before / file)) for file in files})
    return not different, f"{len(GOALS)} goals on {len(LIBRARIES)} libraries, {kinds} different answers" + told(
        different
    )


def same_exports(before: Path, after: Path, format: str) -> tuple[bool, str]:
    count, size, different = 0, 0, []
    for name in EXPORTED:
        folders = [side / "children" / f"{name}-{format}" for side in (before, after)]
        files = [
            {p.name: p.read_bytes() for p in sorted(f.iterdir()) if p.suffix in (".safetensors", ".gguf")}
            for f in folders
        ]
        count, size = count + len(files[0]), size + sum(map(len, files[0].values()))
        names = sorted(files[0].keys() | files[1].keys())
        different += [f"{name}/{file}" for file in names if files[0].get(file) != files[1].get(file)]
    return not different and count > 0, f"{count} files, {size:,} bytes" + told(different)


def told(different: list[str]) -> str:
    return f"; DIFFERENT: {', '.join(different[:5])}{' …' if len(different) > 5 else ''}" if different else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a commit")
    parser.add_argument("--work", type=Path, default=None, help="where artefacts go; kept, and used again")
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="same-bits-"))).resolve()
    checkout, corpus = work / "checkout", work / "corpus"
    work.mkdir(parents=True, exist_ok=True)
    if not checkout.is_dir():
        subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
        subprocess.run(["git", "checkout", "-q", arguments.before], cwd=checkout, check=True)
    if not corpus.is_dir():
        corpus.mkdir()
        for folder in ("email", "asyncio"):
            for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / folder).glob("*.py")):
                shutil.copy(path, corpus / f"{folder}_{path.name}")
    sides = work / "before", work / "after"
    for side, tree in zip(sides, (checkout, ROOT), strict=True):
        make(tree, corpus, side)
    results = {
        "blocks": same_blocks(*sides),
        "scores": same_scores(*sides),
        "architectures": same_architectures(*sides),
        **{f"exports, {format}": same_exports(*sides, format) for format in FORMATS},
    }
    for what, (equal, text) in results.items():
        print(f"{'same' if equal else 'DIFFERENT':<10}{what:<24}{text}")
    sys.exit(not all(equal for equal, _ in results.values()))


if __name__ == "__main__":
    main()
