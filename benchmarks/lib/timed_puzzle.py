"""`puzzle` as torchrun starts it, with what its stages took on standard error: "TIMED stage seconds", of the first process, with all others, and "BEGUN
stage" before. Of an evaluation `text` is reading it and both models' configs, `evaluate` the pass over it, without loading the models.

torchrun --nproc-per-node 2 benchmarks/lib/timed_puzzle.py build-library examples/parent --data DATA --out lib
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

import torch

from puzzle.cli import main
from puzzle.library import build, score
from puzzle.measure import evaluate


def timed(owner: Any, name: str, stage: str) -> None:
    """Make the method or function say how long each call takes."""
    plain = getattr(owner, name)
    first = os.environ.get("RANK", "0") == "0"

    def wrapped(*given: Any, **more: Any) -> Any:
        begin = now()
        if first:
            print(f"BEGUN {stage}", file=sys.stderr, flush=True)
        found = plain(*given, **more)
        if first:
            print(f"TIMED {stage} {now() - begin:.3f}", file=sys.stderr, flush=True)
        return found

    setattr(owner, name, wrapped)


def now() -> float:
    """When the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def read_timed(told: str) -> dict[str, float]:
    """{stage: seconds of all its calls} of what a run has said."""
    found: dict[str, float] = {}
    for stage, seconds in re.findall(r"^TIMED (\w+) ([\d.]+)$", told, re.MULTILINE):
        found[stage] = found.get(stage, 0.0) + float(seconds)
    return found


if __name__ == "__main__":
    timed(build.Builder, "_run_group", "build")
    timed(score.Scorer, "run", "score")
    timed(evaluate, "_opened", "text")
    timed(evaluate, "compare_layered", "evaluate")
    main(prog_name="puzzle")
