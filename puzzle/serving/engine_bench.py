"""`puzzle bench --engine vllm`: what a served child, or an architecture with random weights, delivers in the vLLM that is installed,
beside what `puzzle solve --engine vllm` promised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.measure.architecture import Architecture, Prediction, architecture_path, read_architecture
from puzzle.parents.checkpoint import Checkpoint
from puzzle.parents.structure import Structure
from puzzle.serving.engine_run import ENGINE, Engine, Point, check_engine, measured, measured_random
from puzzle.serving.reference import Export, find_export

COMPARED = ("tokens_per_second", "ttft_seconds", "tpot_seconds", "memory_bytes")


def bench_engine(
    engine: str,
    target: Path,
    *,
    gpu: str,
    python: Path | None = None,
    reader: str | None = None,
    work: Workload | None = None,
    batch: int | None = None,
    precision: str | None = None,
    with_parent: bool = False,
    repeats: int = 3,
) -> dict[str, Any]:
    """Measured figures of `target`, with what identifies it, and of its parent if asked for, with the promises of an architecture.json
    there.

    target: architecture.json or its directory, or a checkpoint that vLLM reads. reader: the format of what has random weights; None: that
    of the costs. work, batch, precision: by default those of the architecture. Promises stand beside what was measured where engine,
    workload, precision and batch are theirs. Raises UserError and EngineFailed as `engine_run.measured` does.
    """
    check_engine(engine)
    path = architecture_path(target)
    solved = read_architecture(path) if path.is_file() and path.suffix == ".json" else None
    stored = (target / "config.json").is_file()
    if not stored and solved is None:
        raise UserError(
            f"{target} is neither a checkpoint nor an architecture: give a child, or what `puzzle solve` wrote"
        )
    if work is None and solved is None:
        raise UserError(f"{target} has no architecture.json with a workload: pass `input_len` and `output_len`")
    if with_parent and solved is None:
        raise UserError("`with_parent` needs an architecture: bench a parent's checkpoint by itself")
    export = find_export(target) if stored else None
    _check_precision(target, export, solved, precision, reader)
    costs = {} if solved is None else solved.costs
    usual = "float32" if gpu == "cpu" else "bf16"
    words = None
    if export is not None:
        checkpoint = Checkpoint(target)
        precision, reader, words = "fp8" if checkpoint.fp8 else usual, export.format, precision_of(checkpoint, usual)
    priced = costs.get("precision", usual)
    precision = precision or (priced if priced in ("fp8", usual) else usual)
    how = Engine(
        gpu=gpu, python=python, reader=reader or costs.get("format", "hf"), precision=precision, repeats=repeats
    )
    work = work or (solved.workload if solved else None)
    assert work is not None
    served = costs.get("device", "").rpartition(", ")[2].partition("==")[0]
    kept = solved is not None and solved.workload == work and served == ENGINE
    promised = solved if kept and priced == precision and " " not in (words or "") else None
    found: dict[str, Any] = {
        "schema": 1,
        "gpu": gpu,
        "engine": engine,
        "workload": asdict(work),
        "precision": words or precision,
    }
    at = batch or (solved.predicted.batch if solved else 1)
    if export is not None:
        lines = measured(
            export.path, export.vocab_size, export.max_length, [Point(batch=at, work=work)], how, random=False
        )
        found["child"] = _measured(list(lines), at, work) | {"fingerprint": checkpoint.fingerprint()}
    else:
        assert solved is not None
        found["child"] = _random(solved.structure(), solved.parent, at, work, how)
    found["child"]["path"] = str(target)
    if with_parent and solved is not None:
        other = batch if batch is not None and solved.workload != work else solved.parent_predicted.batch
        how = how if how.reader in ("hf", "nemotron-nas") else replace(how, reader="hf")
        found["parent"] = _random(solved.reference, solved.reference, other, work, how)
        ours, theirs = (found[who]["measured"]["tokens_per_second"] for who in ("child", "parent"))
        found["speedup"] = {"measured": ours / theirs, "predicted": promised.speedup if promised else None}
    for who, structure, told in _promises(promised):
        if who in found and told.batch == found[who]["measured"]["batch"]:
            assert promised is not None
            tokens = promised.cached_tokens(structure, told)
            found[who]["predicted"] = {name: getattr(told, name) for name in COMPARED} | {"cached_tokens": tokens}
    return found | {"device": found["child"]["measured"]["device"]}


def precision_of(checkpoint: Checkpoint, usual: str) -> str:
    """Of a checkpoint's weights, and of its cache where that has another one or some weights have; usual: where nothing is quantised."""
    said = checkpoint.config.get("quantization_config") or {}
    weights, cache = ("fp8" if there else usual for there in (checkpoint.fp8, said.get("kv_cache_scheme")))
    whole = [name for name in said.get("ignore") or said.get("modules_to_not_convert") or () if name != "lm_head"]
    if weights == "fp8" and whole:
        return f"fp8 but for {len(whole)} modules in bf16, cache {cache}"
    return weights if weights == cache else f"{weights}, cache {cache}"


def _check_precision(
    target: Path, export: Export | None, solved: Architecture | None, precision: str | None, reader: str | None
) -> None:
    """Raise UserError where the precision or format that is asked for, or that a checkpoint has, cannot be measured."""
    if export is not None and (precision, reader) != (None, None):
        raise UserError(
            f"{target} is a checkpoint, whose format and precision it says itself: leave `format` and `fp8` out"
        )
    if export is None and precision is None and solved is not None and solved.kv_dtype is not None:
        raise UserError(
            f"{target} was solved for {solved.precision}, and random weights have one precision: pass `fp8`, or export it and give that"
        )
    if export is not None and export.rounds == "MXFP4":
        raise UserError(
            f"{target} is in MXFP4, which no price is of: give the checkpoint in bf16 that it was made from, or export it"
        )


def _promises(solved: Architecture | None) -> list[tuple[str, Structure, Prediction]]:
    if solved is None:
        return []
    return [("child", solved.structure(), solved.predicted), ("parent", solved.reference, solved.parent_predicted)]


def _random(structure: Structure, parent: Structure, batch: int, work: Workload, how: Engine) -> dict[str, Any]:
    lines = measured_random(structure, parent.usual, [Point(batch=batch, work=work)], how)
    return _measured(list(lines), batch, work)


def _measured(lines: Sequence[dict[str, Any]], batch: int, work: Workload) -> dict[str, Any]:
    """ttft: until all prompts have a token; tpot: per later one. memory: of the weights, and of the cache that the batch fills."""
    facts, found = lines[0]["engine"], lines[1]["measured"]
    if "skipped" in found:
        raise UserError(f"`batch` {batch}: {found['skipped']}; give a smaller one")
    length = work.input_len + work.output_len
    per_token = facts["cache_bytes"] / facts["cached_tokens"] if facts["cached_tokens"] else 0.0
    weights = facts["weight_bytes"]
    measured = {
        "batch": batch,
        "tokens_per_second": batch * work.output_len / found["whole"],
        "ttft_seconds": found["prefill"],
        "tpot_seconds": (found["whole"] - found["prefill"]) / max(1, work.output_len - 1),
        "step_seconds": found["step"],
        "memory_bytes": None if weights is None else int(weights + batch * length * per_token),
        **{name: facts[name] for name in ("weight_bytes", "cache_bytes", "cached_tokens", "used_bytes", "versions", "device")},
    }  # fmt: skip
    return {"measured": measured, "predicted": None}
