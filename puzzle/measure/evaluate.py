"""Parent and child side by side, all measured: divergence on held-out text, and speed, bytes and cache as run here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from puzzle.base.console import console
from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.files import read_json
from puzzle.base.machine import cpu_name
from puzzle.base.workload import Workload
from puzzle.blocklib.modules import Attention
from puzzle.data.packing import load_tokens
from puzzle.measure.plain import Measured, measure
from puzzle.parents.family import HfModel, open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import CausalModel, load_model

MAX_DRIFT = 0.05  # of the parent's speed since the profile; beyond it the speed is measured again
MAX_ATTEMPTS = 3


def evaluate(
    parent_source: str,
    child_source: str,
    data: list[str],
    *,
    num_sequences: int = 64,
    seq_len: int = 1024,
    work: Workload | None = None,
    batches: tuple[int, int] | None = None,
    text_field: str = "text",
    device: str = "auto",
    repeats: int = 3,
) -> dict[str, Any]:
    """{"parent": {...}, "child": {...}, "speedup", "num_tokens", "device"}; every number is measured.

    work: what speed is measured on (None: not measured). batches: of parent and child; None takes those that the
    child's architecture.json names. Raises UserError for models that do not belong together.
    """
    on = pick_device(device)
    dtype = compute_dtype(on)
    parent_model, child_model = open_model(parent_source), open_model(child_source)
    if parent_model.vocab_size != child_model.vocab_size:
        raise UserError(
            f"{parent_source} has {parent_model.vocab_size} tokens, {child_source} {child_model.vocab_size}: "
            "a child shares its parent's tokenizer"
        )
    seq_len = min(seq_len, parent_model.max_length)
    tokens = load_tokens(
        data, parent_model.directory, seq_len=seq_len, num_train=1, num_validation=num_sequences, text_field=text_field
    )
    parent = load_model(parent_model, device=on, dtype=dtype)
    child = load_model(child_model, device=on, dtype=dtype)
    console.print(f"measuring divergence on {tokens.validation.numel():,} held-out tokens")
    itself = compare(parent, parent, tokens.validation)
    against = compare(parent, child, tokens.validation)
    result: dict[str, Any] = {
        "device": str(on) if on.type == "cpu" else torch.cuda.get_device_name(on),
        "dtype": str(dtype).removeprefix("torch."),
        "num_tokens": against["num_tokens"],
        "parent": {"loss": itself["lm_loss"], **_sizes(parent_model, parent)},
        "child": {
            "loss": against["lm_loss"],
            "kl": against["kl"],
            "kl_stderr": against["kl_stderr"],
            "top1_agreement": against["top1_agreement"],
            **_sizes(child_model, child),
        },
    }
    if work is not None:
        solved = _solved(child_model.directory)
        at = batches or ((solved["parent_predicted"]["batch"], solved["predicted"]["batch"]) if solved else (1, 1))
        console.print(f"measuring speed: {work.input_len} tokens in, {work.output_len} out, batch {at[0]} and {at[1]}")
        here = cpu_name() if on.type == "cpu" else torch.cuda.get_device_name(on)
        expected = None
        if solved and batches is None and solved["workload"] == asdict(work) and solved["costs"]["device"] == here:
            expected = solved["parent_predicted"]["tokens_per_second"]
        speed = _steady({"parent": (parent, at[0]), "child": (child, at[1])}, work, repeats, expected)
        for name, found in speed.items():
            result[name] |= {**asdict(found), "memory_bytes": found.memory_bytes}
        result["speedup"] = speed["child"].tokens_per_second / speed["parent"].tokens_per_second
        result["workload"] = asdict(work)
    return result


def _sizes(opened: HfModel, model: CausalModel) -> dict[str, int]:
    weights = [t for _, t in model.named_weights()]
    attending = [block.attention for block in model.blocks if isinstance(block.attention, Attention)]
    per_token = sum(2 * attention.num_kv_heads * attention.head_dim for attention in attending)
    return {
        "num_parameters": sum(t.numel() for t in weights),
        "weight_bytes": sum(t.numel() * t.element_size() for t in weights),
        "kv_bytes_per_token": per_token * weights[0].element_size(),
    }


def _solved(child: Path) -> dict[str, Any] | None:
    path = child / "architecture.json"
    return read_json(path, "puzzle export") if path.is_file() else None


def _steady(
    models: dict[str, tuple[CausalModel, int]], work: Workload, repeats: int, expected: float | None
) -> dict[str, Measured]:
    """Speeds, measured while the machine runs as fast as when it was profiled.

    expected: the parent's tokens/s according to the profile; None measures once. The parent alone decides whether to
    measure again: the attempt with the least drift of the parent counts, whatever the child did.
    """
    attempts: list[dict[str, Measured]] = []
    while True:
        attempts.append(measure(models, work, repeats))
        if expected is None:
            return attempts[0]
        drifts = [abs(found["parent"].tokens_per_second / expected - 1) for found in attempts]
        if drifts[-1] <= MAX_DRIFT or len(attempts) == MAX_ATTEMPTS:
            return attempts[drifts.index(min(drifts))]
        now = attempts[-1]["parent"].tokens_per_second
        console.print(
            f"the parent runs at {now:.5g} tokens/s now, {expected:.5g} when this machine was profiled: measuring again"
        )
