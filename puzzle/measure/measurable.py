"""What `evaluate` and `bench` measure: a parent or a child, wherever it comes from, and its speed on the runtime that was priced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from puzzle.base.console import say
from puzzle.base.device import name_of
from puzzle.base.errors import UserError
from puzzle.base.ranks import Ranks
from puzzle.base.workload import Workload
from puzzle.measure.architecture import Architecture, architecture_beside
from puzzle.measure.serve import Served, serve
from puzzle.parents.opened import open_model
from puzzle.parents.structure import Structure
from puzzle.runtime.interface import Fp8, Runtime
from puzzle.runtime.model import CausalModel, Weights, load_model, random_model
from puzzle.runtime.open import DTYPES, open_runtime

MAX_DRIFT = 0.05  # of the parent's speed since the profile; beyond it the speed is measured again
MAX_ATTEMPTS = 3


class Source(Weights, Protocol):
    """Weights that are on disk."""

    def fingerprint(self) -> str:
        """Hash of what tells them from others."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurable:
    """solved: what was promised for it. tokenizer: its directory; source: its weights; both None where they are random. ranks: of
    which this process loads one's share."""

    name: str
    structure: Structure
    tokenizer: Path | None
    solved: Architecture | None
    source: Source | None
    ranks: Ranks | None = None

    def identity(self) -> dict[str, str]:
        """{"path": as it was given, "fingerprint": of its weights}, the latter where they are not random."""
        return {"path": self.name} | ({} if self.source is None else {"fingerprint": self.source.fingerprint()})

    def load(self, device: torch.device, dtype: torch.dtype) -> CausalModel:
        """Whole, or the share of this rank, on a device."""
        if self.source is not None:
            return load_model(self.source, device=device, dtype=dtype, ranks=self.ranks)
        own = self.structure if self.ranks is None else self.structure.share(self.ranks.world)
        return random_model(own, device, dtype)

    def fp8(self, device: torch.device) -> Fp8 | None:
        """What of it runs in fp8 on this device, where that was solved for; None where all is in one precision.

        Raises UserError where its layers are no longer those that were solved for.
        """
        if self.solved is None or self.solved.kv_dtype is None or device.type != "cuda":
            return None
        if not self.solved.matches(self.structure.layers):
            raise UserError(
                f"{self.name} has other layers than its architecture.json, which says what is in fp8: measure the child as it "
                "was before it was fused or rewritten for an engine"
            )
        return Fp8(weights=self.solved.fp8_weights, cache=self.solved.kv_dtype == "fp8")


def of_checkpoint(source: str, ranks: Ranks | None = None) -> Measurable:
    """A Hugging Face checkpoint, or hub id. ranks: of which this process loads one's share. Raises UserError as `open_model` does."""
    opened = open_model(source)
    return Measurable(
        name=source,
        structure=opened.structure,
        tokenizer=opened.directory,
        solved=architecture_beside(opened.directory),
        source=opened,
        ranks=ranks,
    )


def of_structure(
    name: str, structure: Structure, solved: Architecture | None = None, ranks: Ranks | None = None
) -> Measurable:
    """Random weights: they take the time and the memory of any others. ranks: as `of_checkpoint` has them."""
    return Measurable(name=name, structure=structure, tokenizer=None, solved=solved, source=None, ranks=ranks)


def measure_speeds(
    models: Mapping[str, tuple[Measurable, int]],
    work: Workload,
    device: torch.device,
    precision: str,
    repeats: int,
    expected: float | None = None,
    as_solved: bool = True,
    ranks: Ranks | None = None,
) -> dict[str, Served]:
    """Of every model at its batch, on the runtime that this device's prices come from. as_solved: what was solved for in several
    precisions runs so, whatever `precision` says. ranks: whose shares the models load.

    expected: tokens/s of models["parent"] according to a profile of this machine, which is measured again when it drifted since;
    None measures once. The parent alone decides: the attempt with the least drift counts, whatever the child did. Raises
    UserError for a precision without a runtime here, and for what does not fit.
    """
    length = work.input_len + work.output_len
    for model, _ in models.values():
        work.check_fits(model.structure.max_length, f"the context of {model.name},")

    def maker(model: Measurable, batch: int) -> Callable[[], Runtime]:
        fp8 = model.fp8(device) if as_solved else None
        return lambda: open_runtime(
            model.load(device, DTYPES[precision]), batch, length, precision, fp8=fp8, consume=True, ranks=ranks
        )

    runtimes = {who: maker(*one) for who, one in models.items()}
    attempts: list[dict[str, Served]] = []
    try:
        while True:
            attempts.append(serve(runtimes, work, repeats))
            if expected is None:
                return attempts[0]
            drifts = [abs(found["parent"].tokens_per_second / expected - 1) for found in attempts]
            if drifts[-1] <= MAX_DRIFT or len(attempts) == MAX_ATTEMPTS:
                return attempts[drifts.index(min(drifts))]
            now = attempts[-1]["parent"].tokens_per_second
            say(
                f"the parent runs at {now:.5g} tokens/s now, {expected:.5g} when this machine was profiled: measuring again"
            )
    except torch.cuda.OutOfMemoryError as error:
        asked = ", ".join(f"{batch} of the {who}" for who, (_, batch) in models.items())
        raise UserError(f"a batch ({asked}) does not fit on {name_of(device)}: pass a smaller `batch`") from error
