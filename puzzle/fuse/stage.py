"""`puzzle fuse`: a child on disk -> a child with fewer layers, and what was measured to choose them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from puzzle.base.console import say
from puzzle.base.device import compute_dtype, pick_device, short_name
from puzzle.base.errors import UserError
from puzzle.data.packing import load_tokens
from puzzle.export.card import plain_card
from puzzle.export.child import Child
from puzzle.export.hf import write_hf
from puzzle.export.walker import AT_ONCE, Walker
from puzzle.export.write import Source, open_source
from puzzle.fuse.matrix import Dependency
from puzzle.fuse.rewrite import Norm, fuse_layers, widths_of
from puzzle.fuse.runs import Rule, Run, choose_runs, members, stretches, width_of, worst
from puzzle.parents.structure import Structure
from puzzle.runtime.residency import Memory, Passing, Residency, plan_residency


def open_walker(
    child: Child,
    data: Sequence[str],
    *,
    num_sequences: int = 16,
    seq_len: int = 512,
    text_field: str = "text",
    device: str = "auto",
    memory_limit: int | None = None,
    ffns: bool = False,
) -> tuple[Walker, dict[str, Any]]:
    """The child on its device with held-out text, and the facts of the measurement. ffns: those alone are left out too. Raises
    UserError without text, and without memory for the streams."""
    on = pick_device(device)
    assert child.tokenizer is not None, "what was opened has one"
    tokens = load_tokens(
        list(data),
        child.tokenizer,
        seq_len=min(seq_len, child.around.max_length),
        num_train=1,
        num_validation=num_sequences,
        text_field=text_field,
    )
    (count, length), wanted = tokens.validation.shape, len(child.layers) * (1 + ffns)
    memory, size = Memory.of(on, memory_limit), compute_dtype(on).itemsize
    plan = dependency_plan(child.structure, wanted, count, length, size, memory)
    say(f"measuring on {tokens.validation.numel():,} held-out tokens, the model {plan.told(wanted)}")
    walker = Walker(child, tokens.validation, on, compute_dtype(on), plan)
    facts = {
        "model": child.name,
        "num_tokens": tokens.validation.numel(),
        "data_hash": tokens.hash,
        "device": short_name(on),
        "versions": f"torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    return walker, facts


def dependency_plan(
    structure: Structure, wanted: int, sequences: int, seq_len: int, compute_bytes: int, memory: Memory
) -> Residency:
    """How the model goes over the text, `wanted` streams with something left out beside it. Raises UserError where it cannot."""
    passing = Passing(
        models=[structure],
        sequences=sequences,
        seq_len=seq_len,
        compute_bytes=compute_bytes,
        spare=2,
        wanted=wanted,
        at_once=wanted,
    )
    return plan_residency("dependency of", passing, memory, AT_ONCE)


def pick_runs(child: Child, rule: Rule, dependency: Dependency | None) -> list[Run]:
    """`choose_runs` for a child. Raises UserError, saying what would help, when nothing can be fused."""
    widths = widths_of(child)
    if not stretches(widths):
        free = [str(index) for index, width in enumerate(widths) if width is not None]
        which = f"only {', '.join(free)}" if free else "none"
        raise UserError(
            f"{child.name} has no two neighbouring layers without attention ({which} of its {len(widths)} layers): fuse a "
            "child that drops attention, as `puzzle solve LIBRARY --throughput 2x --fusion` chooses one"
        )
    matrix = None if dependency is None or dependency.layers is None else dependency.layers.dependency
    runs = choose_runs(widths, rule, matrix)
    if runs:
        return runs
    able = ", ".join(f"{first}-{last}" for first, last in stretches(widths))
    if not choose_runs(widths, Rule(keep_last=rule.keep_last)):
        raise UserError(
            f"nothing to fuse: the rows of layers without attention of {child.name} ({able}) have two FFNs each, and "
            "their last one is kept: pass `no_keep_last`"
        )
    if not choose_runs(widths, replace(rule, max_dependency=math.inf)):
        raise UserError(f"`max_width` {rule.max_width} leaves nothing to fuse in layers {able}: allow more channels")
    assert matrix is not None
    rows = [members(stretch, widths)[: -1 if rule.keep_last else None] for stretch in stretches(widths)]
    pairs = [(i, j) for inside in rows for i, j in pairwise(inside)]
    least = min((value for i, j in pairs if (value := matrix[i][j]) is not None), default=0.0)
    raise UserError(
        f"`max_dependency` {rule.max_dependency:g} leaves nothing to fuse in layers {able}: the least dependency there is "
        f"{least:.3g}; allow more, or name `runs` by hand"
    )


def describe(child: Child, runs: Sequence[Run], norm: Norm, dependency: Dependency | None) -> dict[str, Any]:
    """What is fused, as `puzzle fuse --json` prints it. Raises UserError for runs that cannot be."""
    widths = widths_of(child)
    matrix = None if dependency is None or dependency.layers is None else dependency.layers.dependency
    fused = fuse_layers(child, runs, norm)
    return {
        "norm": norm,
        "runs": [
            {
                "first": run[0],
                "last": run[1],
                "widths": [widths[layer] for layer in members(run, widths)],
                "width": width_of(run, widths),
                "dependency": worst(run, widths, matrix),
            }
            for run in sorted(runs)
        ],
        "num_layers": {"before": len(child.layers), "after": len(fused.layers)},
        "num_parameters": {"before": child.num_parameters, "after": fused.num_parameters},
        "layer_origins": [layer.stands_for for layer in fused.layers],
    }


def fuse_child(
    source: Path | Source,
    out: Path,
    runs: Sequence[Run],
    *,
    norm: Norm = "own",
    dependency: Dependency | None = None,
    report: dict[str, Any] | None = None,
    force: bool = False,
    max_shard_bytes: int = 4 * 2**30,
) -> dict[str, Any]:
    """Write the fused child to `out`, sub-block by sub-block, and return `describe`'s facts.

    dependency: kept as dependency.json; report: what was measured of blocks in parallel, kept as parallel.json.
    Raises UserError for runs that cannot be fused, and as `write_checkpoint` does.
    """
    source = source if isinstance(source, Source) else open_source(source)
    child = source.child
    facts = describe(child, runs, norm, dependency)
    extra: dict[str, dict[str, Any]] = {"fusion.json": {"schema": 1, **facts}}
    if dependency is not None:
        extra["dependency.json"] = {"schema": 1, **dependency.to_json()}
    if report is not None:
        extra["parallel.json"] = {"schema": 1, **report}
    solved, done = source.solved, tuple(sorted(runs))
    promised = None  # the predictions, where they still hold
    if solved is not None:
        after = solved.after_fusing(done)
        extra["architecture.json"] = after.to_json()
        promised = after if solved.fuse == done else None
    fused = fuse_layers(child, runs, norm)
    card = f"{plain_card(fused, promised)}\n{_section(facts)}\n"
    write_hf(fused, out, card, extra_json=extra, max_shard_bytes=max_shard_bytes, force=force)
    return facts


def _section(facts: dict[str, Any]) -> str:
    """What the card says of the fusion."""
    rows = "\n".join(
        f"| {run['first']}-{run['last']} | {' + '.join(map(str, run['widths']))} = {run['width']} | "
        f"{'not measured' if run['dependency'] is None else format(run['dependency'], '.3g')} |"
        for run in facts["runs"]
    )
    norm = "its own norm" if facts["norm"] == "own" else "the norm of the last"
    return (
        f"## Fused\n\n{facts['num_layers']['before']} layers became {facts['num_layers']['after']}: the FFNs of a run read "
        f"one input in parallel (arXiv 2503.18908), each through {norm}.\n\n| layers before | channels | largest dependency "
        f"|\n|---|---|---|\n{rows}"
    )
