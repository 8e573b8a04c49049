"""Cost tables of a GPU that were computed and not measured: for tests, and to rehearse on a CPU what solves for GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.library.manifest import Library
from puzzle.profile.cost_table import CostRow, write_costs
from puzzle.profile.parts import Part, ends_of

FACTS = {"num_samples": 9, "device": "a GPU", "versions": "none", "date": "2026-11-27"}


def seconds_of(part: Part, precision: str, phase: str, batch: int, context: int) -> float:
    """Weights are read at their size, prompts take their rows; a decode step of attention also reads what is cached."""
    share = {"bf16": 1.0, "fp8": 0.5}[precision]
    if not isinstance(part, SubBlock):
        return 1e-5
    rows = batch * context if phase == "prefill" else batch
    weights = (share * part.num_parameters + 40 * rows + 300) * 1e-8
    read = part.state().per_token * batch * context if phase == "decode" else 0
    return weights + share * read * 1e-8


def write_gpu_table(
    library: Library,
    precision: str,
    name: str,
    folder: str = "h100-test",
    batches: Sequence[int] = (1, 4),
    contexts: Sequence[int] = (8, 16, 64),
    prompts: Sequence[int] = (16, 64),
    **changed: str,
) -> None:
    """The table costs/<folder>/<name>.csv of `library`, by `seconds_of`. changed: of `FACTS`."""
    rows = []
    for part in [*library.sub_blocks(), *ends_of(library.structure)]:
        if isinstance(part, NoOp):
            continue
        if isinstance(part, SubBlock):
            key, points = part.timed().key(), [("prefill", b, c) for b in batches for c in prompts]
            points += [("decode", b, c) for b in batches for c in ((0,) if part.by_rows else contexts)]
        else:
            key, points = part.key(), [("decode", b, 0) for b in batches]
        for phase, batch, context in points:
            value = seconds_of(part, precision, phase, batch, context)
            times = dict.fromkeys(("p20_s", "p50_s", "p80_s"), value)
            point = {"part": key, "precision": precision, "phase": phase, "batch": batch, "context": context}
            rows.append(CostRow(**point, **times, **FACTS | changed))  # type: ignore[arg-type]
    write_costs(library.root / "costs" / folder / f"{name}.csv", rows)


def shares_of(library: Library, tp: int) -> Library:
    """What one rank runs of it: for tables of shares."""
    spaces = tuple(
        {slot: {name: b.shared(tp) for name, b in names.items()} for slot, names in space.items()}
        for space in library.spaces
    )
    return replace(library, structure=library.structure.share(tp), spaces=spaces)
