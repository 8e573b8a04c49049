"""What `puzzle grow` does with its options: a checkpoint with new experts beside its FFNs, and what it was."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.base.files import SCHEMA, claim_output
from puzzle.base.units import parse_bytes, parse_layers
from puzzle.export.card import plain_card
from puzzle.export.child import Child
from puzzle.export.hf import hf_config, write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.grow.rewrite import Growth, grow_child, growable, new_names
from puzzle.parents.grown import FILE
from puzzle.parents.opened import open_model


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowOptions:
    """layers: such as "0-3,7"; None: all whose FFN can be grown. The rest as `Growth` has it."""

    out: Path
    experts: int
    top_k: int = 1
    width: int | None = None
    layers: str | None = None
    seed: int = 0
    max_shard: str = "4GiB"
    force: bool = False
    dry_run: bool = False


def grow_verb(source: str, wanted: GrowOptions) -> dict[str, Any]:
    """{"child", "out", "layers", "num_parameters", "active_parameters", "num_bytes": [before, after] each, "new_parameters"}.

    Writes a checkpoint as `puzzle export --format hf` does, with grow.json beside it. Raises UserError before anything is written.
    """
    growth = Growth(experts=wanted.experts, top_k=wanted.top_k, width=wanted.width, seed=wanted.seed)
    growth.check()
    max_shard = parse_bytes(wanted.max_shard, "max_shard")
    opened = open_model(source)
    child = child_of_checkpoint(opened)
    if (kind := opened.checkpoint.quantised) is not None:
        raise UserError(f"{source} is in {kind}: grow the checkpoint in bf16 that it was made from")
    able = growable(child)
    layers = able if wanted.layers is None else parse_layers("layers", wanted.layers, len(child.layers))
    grown = grow_child(child, growth, layers)
    hf_config(grown, grown.dtype)  # refuses what it has no words for
    told = {
        "child": source,
        "out": str(wanted.out),
        "dry_run": wanted.dry_run,
        "layers": layers,
        "num_parameters": [child.num_parameters, grown.num_parameters],
        "active_parameters": [child.structure.active_parameters, grown.structure.active_parameters],
        "new_parameters": grown.num_parameters - child.num_parameters,
        "num_bytes": [_bytes(child), _bytes(grown)],
    }
    if wanted.dry_run:
        return told
    claim_output(wanted.out, wanted.force, [source])
    record = {
        "schema": SCHEMA,
        "parent": child.name,
        "fingerprint": opened.fingerprint(),
        **asdict(growth),
        "layers": layers,
        "new": new_names(grown, layers),
    }
    card = plain_card(grown, None).replace("## Serve\n", f"{_section(growth, layers)}\n\n## Serve\n", 1)
    write_hf(grown, wanted.out, card, extra_json={FILE: record}, max_shard_bytes=max_shard, force=wanted.force)
    return told


def _bytes(child: Child) -> int:
    """Of all tensors; those that keep their own dtype are in float32."""
    exact = sum(prod(b.tensors()[name]) for _, _, b in child.structure for name in b.exact if name in b.tensors())
    return child.num_parameters * child.dtype.itemsize + exact * (4 - child.dtype.itemsize)


def _section(growth: Growth, layers: list[int]) -> str:
    """Of the card."""
    width = f" of {growth.width} channels" if growth.width else ""
    return (
        f"## Grown\n\nMade by `puzzle grow`: {growth.experts} new experts{width} beside the FFN of {len(layers)} layers, {growth.top_k} a "
        "token, which add nothing before they are trained. grow.json names the new tensors."
    )
