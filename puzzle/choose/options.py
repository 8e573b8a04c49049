"""What `solve` may be asked beside its goal, as it is typed on the command line or in a recipe. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puzzle.base.errors import UserError, nearest
from puzzle.base.machine import GPUS
from puzzle.base.units import check_positive
from puzzle.base.workload import Workload
from puzzle.choose.fusion import Fusion
from puzzle.choose.goal import Goal
from puzzle.choose.precision import Precisions, parse_precision
from puzzle.choose.problem import Request
from puzzle.choose.solve import open_costs, open_precisions
from puzzle.choose.workloads import AlsoAsked, parse_also
from puzzle.export.engines import CARD_SHARE
from puzzle.library.manifest import Library
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel

BACKENDS = ("ortools", "pulp")


@dataclass(frozen=True, kw_only=True, slots=True)
class SolveOptions:
    """also: further workloads. fusion_dependency: a dependency.json of the parent. shapes: which of several cost tables, or fits. engine:
    who serves; "puzzle" is our own runtime, whose costs are measured. precision: that weights and cache may have, the parent's first
    (None: that of the cost table). The rest as `Request` has it."""

    also: tuple[str, ...] = ()
    fusion: bool = False
    fusion_dependency: Path | None = None
    shapes: str | None = None
    same_batch: bool = False
    engine: str = "puzzle"
    precision: str | None = None
    backend: str = "ortools"
    time_limit: float | None = None
    explain: bool = False

    def check(self) -> None:
        """Raise UserError for a value that cannot be, or an option that another one leaves without use."""
        check_positive(self, "time_limit")
        self.others()
        if self.backend not in BACKENDS:
            raise UserError(f"`backend` {self.backend}: {nearest(self.backend, list(BACKENDS))}")
        if self.fusion_dependency is not None and not self.fusion:
            raise UserError("`fusion_dependency` is not used without `fusion`: leave it out")
        if self.precision is not None:
            parse_precision(self.precision)
            unpriced = "fusion" if self.fusion else "engine" if self.engine != "puzzle" else None
            if unpriced is not None:
                raise UserError(f"`{unpriced}` has no price with `precision`: leave one of them out")

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those to choose from; none where precision is no choice."""
        return () if self.precision is None else parse_precision(self.precision)

    def costs(self, library: Library, gpu: str, name: str | None) -> CostTable | EngineModel | Precisions:
        """The prices that are asked for. name: of the cost table, or of an engine's fit."""
        if self.precision is not None:
            return open_precisions(library, gpu, name, self.precisions)
        return open_costs(library, gpu, name, self.engine)

    def others(self) -> tuple[AlsoAsked, ...]:
        return tuple(parse_also(text) for text in self.also)

    def request(self, library: Library, gpu: str, work: Workload, goal: Goal, baseline: str | None = None) -> Request:
        """gpu: whose card holds the child where it is a known one. Raises UserError for a dependency that is not this parent's."""
        card, share = GPUS.get(gpu.split("-")[0]), 1.0 if self.engine == "puzzle" else CARD_SHARE
        return Request(
            work=work,
            goal=goal,
            also=self.others(),
            backend=self.backend,
            time_limit=self.time_limit,
            baseline=baseline,
            explain=self.explain,
            fusion=Fusion.open(library, self.fusion_dependency) if self.fusion else None,
            same_batch=self.same_batch,
            card=None if card is None else int(share * card.memory_bytes),
        )
