"""What sft.py, grpo.py and assess.py of examples/post_training have left, as two CSVs: post_training.csv and post_training_curves.csv.

    python benchmarks/lib/post_training_rows.py machine WORK/assessed/STEP.machine.json       # where STEP is assessed
    python benchmarks/lib/post_training_rows.py WORK OUT

WORK/assessed/STEP.json is the assessment of a child, WORK/curves/STEP.json the trainer_state.json of what trained it, of those steps of STEPS
that are there. Losses are of a step's batch, rewards means over its answers.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from write_rows import write_rows

STEPS = {
    "healed": "as it was healed",
    "sft": "SFT",
    "grpo_curriculum": "GRPO, with curriculum",
    "grpo_plain": "GRPO, without",
}
MODES = {"on": "detailed thinking on", "off": "detailed thinking off"}
LOGGED = {
    "loss": "loss",
    "accuracy": "rewards/accuracy/mean",
    "format": "rewards/format/mean",
    "answer_tokens": "completions/mean_length",
    "kl": "kl",
    "step_seconds": "step_time",
}


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def machine() -> dict[str, str]:
    """The columns that tell where and when."""
    import torch

    from puzzle.base.machine import cpu_name

    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {"device": device, "versions": versions, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def seconds(logged: list[dict[str, Any]]) -> float | str:
    """Of all steps, those of calls that were stopped among them where each has its time; else of the last call."""
    steps = [line["step_time"] for line in logged if "step_time" in line]
    whole = [line["train_runtime"] for line in logged if "train_runtime" in line]
    return round(sum(steps) if steps else whole[-1], 1) if steps or whole else ""


def rows_of(work: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Of the assessments, and of the steps of training."""
    assessed, curves = [], []
    for step, name in STEPS.items():
        place, curve = work / "assessed" / f"{step}.json", work / "curves" / f"{step}.json"
        logged = read(curve)["log_history"] if curve.is_file() else []
        lines = [line for line in logged if "loss" in line]
        if place.is_file():
            found, where = read(place), read(work / "assessed" / f"{step}.machine.json")
            for mode, said in MODES.items():
                figures = {k: found[said][k] for k in ("format", "format_stderr", "accuracy", "accuracy_stderr")}
                steps = {"steps": len(lines), "train_seconds": seconds(logged)}
                assessed.append(
                    {"child": name, "thinking": mode, **figures, **steps, "questions": found["questions"], **where}
                )
        for line in lines:
            values = {column: line.get(key, "") for column, key in LOGGED.items()}
            curves.append({"child": name, "step": line["step"], **values})
    return assessed, curves


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    work, out = map(Path, sys.argv[1:])
    if sys.argv[1] == "machine":
        out.write_text(json.dumps(machine()), encoding="utf-8")
        return
    for name, rows in zip(("post_training", "post_training_curves"), rows_of(work), strict=True):
        if rows:
            write_rows(out / f"{name}.csv", rows)


if __name__ == "__main__":
    main()
