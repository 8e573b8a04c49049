"""`puzzle bench`: what a checkpoint or an architecture delivers on this GPU, beside what was predicted.

An architecture runs with random weights at its parent's shapes: time does not depend on their values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from puzzle.base.device import check_gpu
from puzzle.base.errors import UserError
from puzzle.base.files import read_json
from puzzle.base.workload import Workload
from puzzle.blocklib.variant import parse_variant
from puzzle.measure.serve import serve
from puzzle.parents.known import Shapes, named_shapes
from puzzle.runtime.fast import Stack, random_stack, stack_of

PARENT = {"attention": "parent", "ffn": "parent"}


def bench(
    target: Path,
    *,
    gpu: str,
    shapes: str | None,
    work: Workload | None = None,
    batch: int | None = None,
    fp8: bool = False,
    with_parent: bool = False,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measured figures of `target`, and of its parent if asked for, with the predictions of an architecture.json there.

    target: architecture.json or its directory (with the name of the parent's shapes), or a checkpoint. work, batch: by default
    those of the architecture. Raises UserError for what is neither, or without the GPU that is named.
    """
    device = torch.device("cpu" if gpu == "cpu" else "cuda")
    if device.type == "cuda":
        check_gpu(gpu)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    solved = _architecture(target)
    is_checkpoint = (target / "config.json").is_file()
    if not is_checkpoint and solved is None:
        raise UserError(
            f"{target} is neither a checkpoint nor an architecture: give a child, or what `puzzle solve` wrote"
        )
    if not is_checkpoint and shapes is None:
        raise UserError("an architecture needs --shapes, the name of its parent's: --shapes llama-3.1-8b")
    if work is None:
        if solved is None:
            raise UserError(f"{target} has no architecture.json with a workload: pass --input-len and --output-len")
        work = Workload(**solved["workload"])
    predicted = solved["predicted"] if solved is not None and solved["workload"] == asdict(work) else None
    batch = batch or (predicted or {}).get("batch") or 1
    found: dict[str, Any] = {
        "schema": 1,
        "gpu": gpu,
        "workload": asdict(work),
        "dtype": "fp8" if fp8 else str(dtype)[6:],
    }
    found["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"

    def run(stack: Stack, at: int, promised: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            measured = asdict(serve(stack, at, work, repeats, fp8))
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(f"batch {at} does not fit on {found['device']}: pass a smaller --batch") from error
        keep = ("tokens_per_second", "ttft_seconds", "tpot_seconds", "memory_bytes", "workspace_bytes")
        same = promised is not None and promised["batch"] == at
        return {"measured": measured, "predicted": {k: promised[k] for k in keep} if same and promised else None}

    named = named_shapes(shapes) if shapes is not None else None
    if is_checkpoint:
        from puzzle.runtime.model import load_model

        stack = stack_of(load_model(str(target), device=str(device), dtype=dtype))
    else:
        assert named is not None
        assert solved is not None
        stack = random_stack(named, fused_layers(_fitting(named, solved), solved), device, dtype)
    found["child"] = run(stack, batch, predicted)
    if with_parent:
        if named is None or solved is None:
            raise UserError("--with-parent needs an architecture and --shapes: bench a parent's checkpoint by itself")
        del stack
        if device.type == "cuda":
            torch.cuda.empty_cache()
        theirs = solved["parent_predicted"] if predicted else None
        stack = random_stack(named, [PARENT] * named.num_layers, device, dtype)
        found["parent"] = run(stack, theirs["batch"] if theirs else batch, theirs)
        ours, other = (found[k]["measured"]["tokens_per_second"] for k in ("child", "parent"))
        found["speedup"] = {"measured": ours / other, "predicted": predicted["speedup"] if predicted else None}
    return found


def fused_layers(shapes: Shapes, solved: Mapping[str, Any]) -> list[dict[str, str]]:
    """The variants of each layer that runs: with `solve --fusion` a run of layers is one FFN of all their channels."""
    layers, found, begin = solved["layers"], [], 0
    for first, last in solved.get("fuse", []):
        widths = (
            parse_variant("ffn", layers[i]["ffn"], shapes.spec).shape(shapes.spec) for i in range(first, last + 1)
        )
        width = sum(int(re.findall(r" f(\d+)", shape)[0]) for shape in widths)
        found += [*layers[begin:first], {"attention": "none", "ffn": f"f{width}"}]
        begin = last + 1
    return [*found, *layers[begin:]]


def _architecture(target: Path) -> dict[str, Any] | None:
    path = target / "architecture.json" if target.is_dir() else target
    return read_json(path, "puzzle solve") if path.is_file() and path.suffix == ".json" else None


def _fitting(shapes: Shapes, solved: dict[str, Any]) -> Shapes:
    if len(solved["layers"]) != shapes.num_layers:
        raise UserError(
            f"the architecture has {len(solved['layers'])} layers and --shapes {shapes.num_layers}: name its own parent's"
        )
    return shapes
