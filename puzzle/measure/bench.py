"""`puzzle bench`: what a checkpoint or an architecture delivers on this machine, beside what was predicted.

An architecture runs with random weights at its parent's shapes: time does not depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from puzzle.base.device import check_gpu
from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.measure.architecture import Prediction, architecture_path, read_architecture
from puzzle.measure.serve import serve
from puzzle.runtime.model import CausalModel, load_model, random_model
from puzzle.runtime.open import DTYPES, open_runtime, usual_precision

COMPARED = ("tokens_per_second", "ttft_seconds", "tpot_seconds", "memory_bytes", "workspace_bytes")


def bench(
    target: Path,
    *,
    gpu: str,
    work: Workload | None = None,
    batch: int | None = None,
    precision: str | None = None,
    with_parent: bool = False,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measured figures of `target`, and of its parent if asked for, with the predictions of an architecture.json there.

    target: architecture.json or its directory, or a checkpoint. work, batch, precision: by default those of the architecture.
    Raises UserError for what is neither, or without the GPU that is named.
    """
    device = torch.device("cpu" if gpu == "cpu" else "cuda")
    if device.type == "cuda":
        check_gpu(gpu)
    path = architecture_path(target)
    solved = read_architecture(path) if path.is_file() and path.suffix == ".json" else None
    is_checkpoint = (target / "config.json").is_file()
    if not is_checkpoint and solved is None:
        raise UserError(
            f"{target} is neither a checkpoint nor an architecture: give a child, or what `puzzle solve` wrote"
        )
    if work is None:
        if solved is None:
            raise UserError(f"{target} has no architecture.json with a workload: pass `input_len` and `output_len`")
        work = solved.workload
    promised = solved if solved is not None and solved.workload == work else None
    batch = batch or (promised.predicted.batch if promised else 1)
    asked = precision or usual_precision(device)
    found: dict[str, Any] = {
        "schema": 1,
        "gpu": gpu,
        "workload": asdict(work),
        "precision": asked,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }

    def run(make: Callable[[], CausalModel], at: int, prediction: Prediction | None) -> dict[str, Any]:
        length = work.input_len + work.output_len
        try:
            runtimes = {"it": lambda: open_runtime(make(), at, length, asked, consume=True)}
            measured = serve(runtimes, work, repeats)["it"]
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(f"batch {at} does not fit on {found['device']}: pass a smaller `batch`") from error
        same = prediction if prediction is not None and prediction.batch == at else None
        return {
            "measured": asdict(measured),
            "predicted": None if same is None else {name: getattr(same, name) for name in COMPARED},
        }

    def child() -> CausalModel:
        if solved is None or is_checkpoint:
            return load_model(str(target), device=device, dtype=DTYPES[asked])
        return random_model(solved.structure(), device, DTYPES[asked])

    found["child"] = run(child, batch, promised.predicted if promised else None)
    if with_parent:
        if solved is None:
            raise UserError("`with_parent` needs an architecture: bench a parent's checkpoint by itself")
        theirs = promised.parent_predicted if promised else None
        at = theirs.batch if theirs else batch
        found["parent"] = run(lambda: random_model(solved.parent, device, DTYPES[asked]), at, theirs)
        ours, other = (found[k]["measured"]["tokens_per_second"] for k in ("child", "parent"))
        found["speedup"] = {"measured": ours / other, "predicted": promised.speedup if promised else None}
    return found
