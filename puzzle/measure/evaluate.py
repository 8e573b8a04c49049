"""Parent and child side by side, all measured: divergence on held-out text, and speed, bytes and cache as run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from puzzle.base.console import console
from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError
from puzzle.base.machine import cpu_name
from puzzle.base.units import check_positive
from puzzle.base.workload import Workload
from puzzle.data.packing import load_tokens
from puzzle.measure.architecture import architecture_beside
from puzzle.measure.serve import Served, serve
from puzzle.parents.opened import HfModel, open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.interface import Runtime
from puzzle.runtime.model import load_model
from puzzle.runtime.open import DTYPES, open_runtime, usual_precision

MAX_DRIFT = 0.05  # of the parent's speed since the profile; beyond it the speed is measured again
MAX_ATTEMPTS = 3


@dataclass(kw_only=True, slots=True)
class EvaluateOptions:
    """sequences: held-out ones, of seq_len tokens. repeats: of the speed measurement."""

    sequences: int = 64
    seq_len: int = 1024
    repeats: int = 3
    text_field: str = "text"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_positive(self, "sequences", "seq_len", "repeats")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """One model. kl, kl_stderr, top1_agreement: of its parent; None for the parent itself. speed: None where not measured."""

    loss: float
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    kl: float | None = None
    kl_stderr: float | None = None
    top1_agreement: float | None = None
    speed: Served | None = None

    def to_json(self) -> dict[str, Any]:
        value = {name: item for name, item in asdict(self).items() if item is not None and name != "speed"}
        return value | (asdict(self.speed) if self.speed is not None else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every number is measured. device: "cpu", or a GPU's name. speedup, workload: None where speed was not measured."""

    device: str
    precision: str
    num_tokens: int
    parent: Evaluated
    child: Evaluated
    speedup: float | None = None
    workload: Workload | None = None

    def to_json(self) -> dict[str, Any]:
        value = asdict(self) | {"parent": self.parent.to_json(), "child": self.child.to_json()}
        return {name: item for name, item in value.items() if item is not None}


def evaluate(
    parent_source: str,
    child_source: str,
    data: list[str],
    options: EvaluateOptions | None = None,
    *,
    work: Workload | None = None,
    batches: tuple[int, int] | None = None,
) -> Evaluation:
    """work: what speed is measured on (None: not measured). batches: of parent and child; None takes those that the
    child's architecture.json names. Raises UserError for models that do not belong together.
    """
    options = options or EvaluateOptions()
    on = pick_device(options.device)
    dtype = compute_dtype(on)
    parent_model, child_model = open_model(parent_source), open_model(child_source)
    theirs, ours = parent_model.structure.vocab_size, child_model.structure.vocab_size
    if theirs != ours:
        raise UserError(
            f"{parent_source} has {theirs} tokens, {child_source} {ours}: a child shares its parent's tokenizer"
        )
    tokens = load_tokens(
        data,
        parent_model.directory,
        seq_len=min(options.seq_len, parent_model.structure.max_length),
        num_train=1,
        num_validation=options.sequences,
        text_field=options.text_field,
    )
    parent = load_model(parent_model, device=on, dtype=dtype)
    child = load_model(child_model, device=on, dtype=dtype)
    console.print(f"measuring divergence on {tokens.validation.numel():,} held-out tokens")
    itself = compare(parent, parent, tokens.validation)
    against = compare(parent, child, tokens.validation)
    sizes = [_sizes(opened, dtype) for opened in (parent_model, child_model)]
    del parent, child  # the runtimes want their memory
    speeds = {} if work is None else _speeds(parent_model, child_model, work, batches, on, options.repeats)
    fast, slow = speeds.get("child"), speeds.get("parent")
    return Evaluation(
        device=str(on) if on.type == "cpu" else torch.cuda.get_device_name(on),
        precision=usual_precision(on),
        num_tokens=int(against["num_tokens"]),
        parent=Evaluated(loss=itself["lm_loss"], speed=slow, **sizes[0]),
        child=Evaluated(
            loss=against["lm_loss"],
            kl=against["kl"],
            kl_stderr=against["kl_stderr"],
            top1_agreement=against["top1_agreement"],
            speed=fast,
            **sizes[1],
        ),
        speedup=fast.tokens_per_second / slow.tokens_per_second if fast and slow else None,
        workload=work,
    )


def _sizes(opened: HfModel, dtype: torch.dtype) -> dict[str, int]:
    structure = opened.structure
    per_token = sum(sub_block.state().per_token for _, _, sub_block in structure)
    return {
        "num_parameters": structure.num_parameters,
        "weight_bytes": structure.num_parameters * dtype.itemsize,
        "kv_bytes_per_token": per_token * dtype.itemsize,
    }


def _speeds(
    parent: HfModel,
    child: HfModel,
    work: Workload,
    batches: tuple[int, int] | None,
    device: torch.device,
    repeats: int,
) -> dict[str, Served]:
    """Of both, each at its batch."""
    solved = architecture_beside(child.directory)
    at = batches or ((solved.parent_predicted.batch, solved.predicted.batch) if solved else (1, 1))
    console.print(f"measuring speed: {work.input_len} tokens in, {work.output_len} out, batch {at[0]} and {at[1]}")
    here = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    expected = None
    if solved and batches is None and solved.workload == work and solved.costs["device"] == here:
        expected = solved.parent_predicted.tokens_per_second
    precision, length = usual_precision(device), work.input_len + work.output_len
    dtype = DTYPES[precision]

    def maker(opened: HfModel, batch: int) -> Callable[[], Runtime]:
        return lambda: open_runtime(
            load_model(opened, device=device, dtype=dtype), batch, length, precision, consume=True
        )

    return _steady({"parent": maker(parent, at[0]), "child": maker(child, at[1])}, work, repeats, expected)


def _steady(
    runtimes: dict[str, Callable[[], Runtime]], work: Workload, repeats: int, expected: float | None
) -> dict[str, Served]:
    """Speeds, measured while the machine runs as fast as when it was profiled.

    expected: the parent's tokens/s according to the profile; None measures once. The parent alone decides whether to
    measure again: the attempt with the least drift of the parent counts, whatever the child did.
    """
    attempts: list[dict[str, Served]] = []
    while True:
        attempts.append(serve(runtimes, work, repeats))
        if expected is None:
            return attempts[0]
        drifts = [abs(found["parent"].tokens_per_second / expected - 1) for found in attempts]
        if drifts[-1] <= MAX_DRIFT or len(attempts) == MAX_ATTEMPTS:
            return attempts[drifts.index(min(drifts))]
        now = attempts[-1]["parent"].tokens_per_second
        console.print(
            f"the parent runs at {now:.5g} tokens/s now, {expected:.5g} when this machine was profiled: measuring again"
        )
