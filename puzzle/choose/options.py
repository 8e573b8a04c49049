"""What `solve` may be asked beside its goal, as it is typed on the command line or in a recipe. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle.base.console import say
from puzzle.base.errors import UserError, nearest
from puzzle.base.machine import GPUS
from puzzle.base.units import check_positive
from puzzle.base.workload import Workload
from puzzle.blocklib.sub_block import check_tp
from puzzle.choose.fusion import Fusion
from puzzle.choose.goal import Goal
from puzzle.choose.precision import Precisions, parse_precision
from puzzle.choose.problem import Request, fitted
from puzzle.choose.solve import open_costs, open_precisions
from puzzle.choose.workloads import AlsoAsked, parse_also
from puzzle.export.engines import CARD_SHARE
from puzzle.library.manifest import Library
from puzzle.profile.all_reduce import AllReduces, find_all_reduces, measuring
from puzzle.profile.cost_table import PACKAGED, CostTable
from puzzle.profile.engine import EngineModel

BACKENDS = ("ortools", "pulp")


@dataclass(frozen=True, kw_only=True, slots=True)
class SolveOptions:
    """also: further workloads. fusion_dependency: a dependency.json of the parent. shapes: which of several cost tables, or fits. engine:
    who serves; "puzzle" is our own runtime, whose costs are measured. precision: that weights and cache may have, the parent's first
    (None: that of the cost table). tp: GPUs that share every sub-block. finalists: near-optimal children that are measured, differing in
    min_distance layers; pairs: and again with interactions fitted from them; rounds: of new scores around the best child. The rest as
    `Request` has it."""

    also: tuple[str, ...] = ()
    fusion: bool = False
    fusion_dependency: Path | None = None
    shapes: str | None = None
    same_batch: bool = False
    engine: str = "puzzle"
    precision: str | None = None
    tp: int = 1
    backend: str = "ortools"
    time_limit: float | None = None
    explain: bool = False
    finalists: int | None = None
    min_distance: int = 1
    pairs: bool = False
    rounds: int | None = None

    def check(self) -> None:
        """Raise UserError for a value that cannot be, or an option that another one leaves without use."""
        check_positive(self, "time_limit", "finalists", "min_distance", "rounds")
        self.others()
        check_tp(self.tp)
        if self.tp > 1 and self.engine != "puzzle":
            raise UserError(
                f"`tp` {self.tp} has no price with `engine` {self.engine}, whose fits are of one GPU: leave one of them out"
            )
        if self.backend not in BACKENDS:
            raise UserError(f"`backend` {self.backend}: {nearest(self.backend, BACKENDS)}")
        if self.fusion_dependency is not None and not self.fusion:
            raise UserError("`fusion_dependency` is not used without `fusion`: leave it out")
        if self.pairs and self.finalists is None:
            raise UserError("`pairs` are fitted from measured children: pass `finalists` too, such as 16")
        if self.measures:
            what = "finalists" if self.finalists is not None else "rounds"
            for name in ("fusion", "precision", "explain"):
                if getattr(self, name):
                    raise UserError(f"`{name}` is not measured with `{what}`: leave one of them out")
        if self.precision is not None:
            parse_precision(self.precision)
            unpriced = "fusion" if self.fusion else "engine" if self.engine != "puzzle" else None
            if unpriced is not None:
                raise UserError(f"`{unpriced}` has no price with `precision`: leave one of them out")

    @property
    def measures(self) -> bool:
        """Whether the answer is chosen by measured divergence, for which text is needed."""
        return self.finalists is not None or self.rounds is not None

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those to choose from; none where precision is no choice."""
        return () if self.precision is None else parse_precision(self.precision)

    def costs(self, library: Library, gpu: str, name: str | None) -> CostTable | EngineModel | Precisions:
        """The prices that are asked for; what an engine's fit has none for is said. name: of the cost table, or of an engine's fit."""
        if self.precision is not None:
            return open_precisions(library, gpu, name, self.precisions, self.tp)
        costs = open_costs(library, gpu, name, self.engine, self.tp)
        if left_out := fitted(library, costs)[1]:
            told = f"no fit of {self.engine} on {gpu} has measured {', '.join(left_out)}: left out"
            say(told)
        return costs

    def priced(
        self, points: Sequence[Library], gpu: str, whole: CostTable | EngineModel | Precisions
    ) -> list[tuple[Library, CostTable | EngineModel]]:
        """Libraries of global points with their prices: by the same fit as the whole parent's, or by tables of the same device and
        precision. Raises UserError where a point has none."""
        assert not isinstance(whole, Precisions)
        found: list[tuple[Library, CostTable | EngineModel]] = []
        for one in points:
            if one.point is None or isinstance(whole, EngineModel):
                found.append((one, whole.of(one.structure) if isinstance(whole, EngineModel) else whole))
                continue
            try:
                table = open_costs(one, gpu, None, tp=self.tp)
            except UserError as error:
                raise UserError(f"library {one.root}: {error}") from error
            if (table.device, table.precision) != (whole.device, whole.precision):
                raise UserError(
                    f"library {one.root} is priced on {table.device} in {table.precision}, the whole parent on {whole.device} in "
                    f"{whole.precision}: profile both alike"
                )
            found.append((one, table))
        return found

    def shared(self, library: Library, gpu: str) -> Library:
        """`library` without the variants that `tp` GPUs cannot share, which is said. Raises UserError where there is no share."""
        if self.tp == 1:
            return library
        if gpu == "cpu":
            raise UserError(f"`tp` {self.tp}: shares are priced on GPUs, and `gpu` is cpu: leave `tp` out")
        library, left_out = library.shareable(self.tp)
        if left_out:
            say(f"{self.tp} GPUs cannot share {', '.join(left_out)}: left out")
        return library

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
            reduces=None if self.tp == 1 else self._reduces(library, gpu),
        )

    def _reduces(self, library: Library, gpu: str) -> AllReduces:
        found = find_all_reduces(gpu, self.tp, [library.root / "costs", PACKAGED])
        if found.stands_in is not None:
            say(
                f"all-reduces between {self.tp} {gpu} were not measured: those of {found.device} ({found.date}), whose links are the same, "
                f"stand in; to measure them, run {measuring(gpu, self.tp, 'LIBRARY')}",
            )
        return found
