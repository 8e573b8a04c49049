"""`puzzle bench`: what a checkpoint or an architecture delivers on this machine, beside what was predicted.

An architecture runs with random weights at its parent's shapes: time does not depend on their values.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from puzzle.base.console import say
from puzzle.base.device import check_gpu
from puzzle.base.errors import UserError
from puzzle.base.machine import several
from puzzle.base.workload import Workload
from puzzle.blocklib.sub_block import check_tp
from puzzle.measure.architecture import architecture_path, read_architecture
from puzzle.measure.measurable import measure_speeds, name_of, of_checkpoint, of_structure
from puzzle.runtime.open import pick_precision
from puzzle.runtime.parallel import joined

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
    tp: int | None = None,
) -> dict[str, Any]:
    """Measured figures of `target`, with what identifies it, and of its parent if asked for, with the predictions of an
    architecture.json there.

    target: architecture.json or its directory, or a checkpoint. work, batch, precision, tp: by default those of the architecture, as
    far as this device has a runtime for it. Predictions stand beside what was measured where device, workload, precision, batch
    and tp are theirs. tp: processes that share every sub-block, each on a GPU of its own, under torchrun; bytes are the first one's.
    Raises UserError for what is neither, or without the GPU that is named.
    """
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
    count = tp or (1 if solved is None else solved.tp)
    check_tp(count)
    with joined(count, gpu) as (ranks, device):
        if device.type == "cuda":
            check_gpu(gpu)
        asked = precision or pick_precision(device, None if solved is None else solved.costs["precision"])
        here = several(name_of(device), count)
        kept = solved is not None and solved.workload == work and solved.costs["precision"] == asked
        if precision is not None and solved is not None and solved.kv_dtype is not None:
            kept = False  # all in one precision is not what was solved for
        if kept and solved is not None and solved.costs["device"] != here:
            say(f"promised for {solved.costs['device']}, measured on {here}: no prediction is held against it")
            kept = False
        promised = solved if kept else None
        if with_parent and solved is None:
            raise UserError("`with_parent` needs an architecture: bench a parent's checkpoint by itself")
        models = {}
        if with_parent and solved is not None:
            at = solved.parent_predicted.batch if batch is None or solved.workload == work else batch
            models["parent"] = (of_structure("the parent", solved.reference, ranks=ranks), at)
        child = of_structure(str(target), solved.structure(), solved, ranks) if solved and not is_checkpoint else None
        models["child"] = (
            child or of_checkpoint(str(target), ranks),
            batch or (solved.predicted.batch if solved else 1),
        )
        predictions = {}
        if promised is not None:
            predictions = {"child": promised.predicted, "parent": promised.parent_predicted}
        found: dict[str, Any] = {
            "schema": 1,
            "gpu": gpu,
            "workload": asdict(work),
            "tp": count,
            "precision": solved.precision if promised is not None and solved is not None else asked,
            "device": here if device.type == "cuda" else "cpu",
        }
        speeds = measure_speeds(models, work, device, asked, repeats, as_solved=precision is None, ranks=ranks)
        for who, measured in speeds.items():
            theirs = predictions.get(who)
            same = theirs if theirs is not None and theirs.batch == measured.batch else None
            told = None if same is None else {name: getattr(same, name) for name in COMPARED}
            found[who] = {"measured": asdict(measured), "predicted": told}
        found["child"] |= models["child"][0].identity()
        if with_parent:
            ours, other = (found[k]["measured"]["tokens_per_second"] for k in ("child", "parent"))
            found["speedup"] = {"measured": ours / other, "predicted": promised.speedup if promised else None}
        return found
