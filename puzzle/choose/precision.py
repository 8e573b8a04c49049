"""Precision as a choice: bf16 or fp8 weights for every sub-block, and one dtype for all that is cached. Needs no torch.

The cache is one choice for the whole model, so that every way to have it is a problem of its own, and the best answer counts. The
plain ways, where all is in one precision, are among them: as each uses its own table alone, no answer is worse than theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from puzzle.base.errors import UserError, nearest
from puzzle.base.files import content_hash
from puzzle.profile.cost_table import CostTable
from puzzle.profile.engine import EngineModel

PRECISIONS = ("bf16", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """tables: by the precision that the weights of a sub-block may have; what is in bf16 either way is priced by the first. cache:
    the dtype of what is cached, one of them."""

    tables: Mapping[str, CostTable | EngineModel]
    cache: str

    @property
    def first(self) -> CostTable | EngineModel:
        return next(iter(self.tables.values()))

    @property
    def batches(self) -> list[int]:
        """The batch sizes that all tables have."""
        return [b for b in self.first.batches if all(b in table.batches for table in self.tables.values())]


@dataclass(frozen=True, kw_only=True, slots=True)
class Precisions:
    """tables: by precision, all of one device; the parent is priced in the first."""

    tables: Mapping[str, CostTable]

    @property
    def ways(self) -> list[Way]:
        """The plain ones first, then those in which weights have any precision, with the smallest cache last."""
        plain = [Way(tables={name: table}, cache=name) for name, table in self.tables.items()]
        return plain if len(plain) == 1 else [*plain, *(Way(tables=self.tables, cache=name) for name in PRECISIONS)]

    @property
    def hash(self) -> str:
        hashes = [table.hash for table in self.tables.values()]
        return hashes[0] if len(hashes) == 1 else content_hash(hashes)


def parse_precision(text: str) -> tuple[str, ...]:
    """'bf16,fp8' -> ("bf16", "fp8"). Raises UserError for another name, or one given twice."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in PRECISIONS:
            raise UserError(f"`precision` {text}: {nearest(name, PRECISIONS)}")
        if names.count(name) > 1:
            raise UserError(f"`precision` {text}: '{name}' stands there twice")
    return names
