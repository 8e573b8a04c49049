"""Measure what every variant of a library costs on this machine: `puzzle profile LIB --gpu cpu`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

import torch
import torch.nn.functional as F

from puzzle.base.console import progress
from puzzle.base.errors import UserError
from puzzle.base.files import check_writable
from puzzle.base.machine import cpu_name
from puzzle.blocklib.layer import KINDS
from puzzle.blocklib.variant import parse_variant
from puzzle.library.manifest import Library
from puzzle.parents.family import open_model
from puzzle.profile.cost_table import CostRow, write_costs
from puzzle.profile.sub_block import Timing, bind, rotating_copies, time_calls, time_sub_block
from puzzle.runtime.model import Block, CausalModel, load_model
from puzzle.runtime.plain import Runner


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What to measure: batches, prompt lengths for prefill, and cached tokens for decode."""

    batches: tuple[int, ...] = (1, 4, 16, 64)
    prefill: tuple[int, ...] = (64, 128, 256)
    decode: tuple[int, ...] = (64, 128, 256, 512)
    seconds: float = 0.2  # spent on one point in each round
    rounds: int = 2  # the grid is walked this many times, so that a slow minute does not sit on one variant
    min_samples: int = 4

    @property
    def capacity(self) -> int:
        """Tokens that caches are made for: the longest context and one more."""
        return max(*self.prefill, *self.decode) + 1


def profile_library(root: Path, *, gpu: str, grid: Grid, name: str | None = None, parent: str | None = None) -> Path:
    """Time every variant's prefill and decode and write LIB/costs/<gpu>/<name>.csv. Returns its path.

    Raises UserError when `gpu` is not this machine: a cost is measured where it will be paid.
    """
    library = Library.open(root)
    if gpu != "cpu":
        raise UserError(f"--gpu {gpu}: this version profiles the CPU it runs on (--gpu cpu)")
    source = library.parent_source(parent)
    opened = open_model(source)
    library.check_parent(opened.checkpoint.fingerprint(), source)
    out = root / "costs" / gpu / f"{name or library.facts['parent']['name']}.csv"
    check_writable(out.parent)
    if grid.capacity - 1 > opened.max_length:
        raise UserError(f"--contexts up to {grid.capacity - 1} exceed the parent's context of {opened.max_length}")
    spec = opened.spec
    shapes: dict[tuple[str, str], object] = {}
    for kind in KINDS:
        for variant_name in library.variants(kind):
            variant = parse_variant(kind, variant_name, spec)
            if variant.shape(spec) != "none":
                shapes.setdefault((kind, variant.shape(spec)), variant)
    head = library.facts["model"]["head_shape"]
    points = [
        (kind, shape, phase, batch, context)
        for kind, shape in [("model", "parent"), ("embedding", head), ("head", head), *shapes]
        for batch in grid.batches
        for phase, contexts in (("prefill", grid.prefill), ("decode", grid.decode))
        for context in contexts
    ]
    samples: dict[tuple, list[Timing]] = {point: [] for point in points}
    stage = _Stage(load_model(opened), grid)
    with progress("profile", len(points) * grid.rounds) as bar, torch.inference_mode():
        for _ in range(grid.rounds):
            for point in points:
                kind, shape, phase, batch, context = point
                bar.note(f"{kind} {shape}")
                samples[point].append(stage.time(kind, shape, shapes.get((kind, shape)), phase, batch, context))
                bar.advance()
    versions = f"torch {torch.__version__}"
    rows = [
        CostRow(
            kind=point[0],
            shape=point[1],
            phase=point[2],
            batch=point[3],
            context=point[4],
            dtype="float32",
            p20_s=median(t.p20 for t in found),
            p50_s=median(t.p50 for t in found),
            p80_s=median(t.p80 for t in found),
            num_samples=sum(t.num_samples for t in found),
            device=cpu_name(),
            versions=versions,
            date=time.strftime("%Y-%m-%d"),
        )
        for point, found in samples.items()
    ]
    write_costs(out, rows)
    return out


class _Stage:
    """Times any point of the grid; keeps the copies of the shape in hand. Random weights cost what trained ones do."""

    def __init__(self, model: CausalModel, grid: Grid):
        self.model, self.grid, self.spec = model, grid, model.spec
        blocks = cast("list[Block]", list(model.blocks))
        self.like = model.embedding.weight
        self.partners = {
            "attention": [block.ffn for block in blocks],
            "ffn": [block.attention for block in blocks],
        }
        self._copies: tuple[str, list] = ("", [])

    def time(self, kind: str, shape: str, variant, phase: str, batch: int, context: int) -> Timing:
        if kind == "model":
            return self._whole(phase, batch, context)
        if kind not in KINDS:
            return self._fixed(kind, phase, batch, context)
        if self._copies[0] != kind + shape:
            module = variant.empty(self.spec).requires_grad_(False)
            self._copies = (kind + shape, rotating_copies(module, len(self.model.blocks)))
        return time_sub_block(
            self._copies[1],
            self.partners[kind],
            self.spec,
            phase=phase,
            batch=batch,
            context=context,
            capacity=self.grid.capacity,
            like=self.like,
            seconds=self.grid.seconds,
            min_samples=self.grid.min_samples,
        )

    def _fixed(self, kind: str, phase: str, batch: int, context: int) -> Timing:
        """The embedding, or final norm, head and argmax of one position (a prompt needs only its last)."""
        before = bind(self.partners["attention"][-1], self.spec, phase, batch, context, self.grid.capacity, self.like)
        if kind == "embedding":
            num_tokens = context if phase == "prefill" else 1
            ids = torch.randint(0, self.model.embedding.num_embeddings, (batch, num_tokens))
            timed = lambda: F.embedding(ids, self.model.embedding.weight)  # noqa: E731
        else:
            x = torch.randn(batch, 1, self.spec.hidden_size)
            timed = lambda: self.model.logits(x).argmax(-1)  # noqa: E731
        return time_calls([(before, timed)], self.grid.seconds, self.grid.min_samples)

    def _whole(self, phase: str, batch: int, context: int) -> Timing:
        """The whole parent: what the sum of its parts is held against."""
        runner = Runner(self.model, batch, self.grid.capacity)
        if phase == "prefill":
            ids = torch.randint(0, self.model.embedding.num_embeddings, (batch, context))
            timed = lambda: runner.prefill(ids)  # noqa: E731
        else:
            runner.randomize()
            ids = torch.randint(0, self.model.embedding.num_embeddings, (batch, 1))
            timed = lambda: runner.step(ids, context)  # noqa: E731
        return time_calls([(lambda: None, timed)], 2 * self.grid.seconds, self.grid.min_samples)
