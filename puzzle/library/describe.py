"""library.json, written: the parent's structure and what the library offers in each layer and slot."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from puzzle import __version__
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, read_any, write_json
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.variant import PARENT
from puzzle.data.packing import TokenData
from puzzle.library.manifest import SCHEMA, Space
from puzzle.library.store import BlockStore
from puzzle.parents.opened import HfModel
from puzzle.parents.point import Point, point_of


def write_library(
    root: Path,
    parent: HfModel,
    data: TokenData,
    recipe: Recipe,
    seed: int,
    spaces: Mapping[int, Mapping[str, Space]],
    first: Mapping[str, Any] | None = None,
) -> None:
    """New, or the same parent with the search space widened; what was asked for before and has no block, since that build was stopped, is no
    longer offered. spaces: per layer and slot; first: as `origin_facts`, where the parent is a healed child. Raises UserError for another
    parent or origin."""
    fingerprint, point = parent.checkpoint.fingerprint(), point_of(parent.directory)
    path, source = root / "library.json", parent.source
    store, layers = BlockStore(root), dict[str, dict[str, dict[str, str]]]()
    if path.is_file():
        old = read_any(path, "puzzle build-library")
        try:
            theirs, before = str(old["parent"]["fingerprint"]), (old.get("origin") or old["parent"]).get("name")
            there = old["layers"] if old.get("schema") == SCHEMA else {}
            layers = {
                index: {
                    slot: {
                        name: key for name, key in keys.items() if store.record_path(int(index), slot, name).is_file()
                    }
                    for slot, keys in slots.items()
                }
                for index, slots in there.items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{path} is broken ({error}): remove it, and run the same command again; it keeps all blocks"
            ) from error
        if theirs != fingerprint:
            raise UserError(
                f"library {root} was built from another parent (fingerprint {theirs[:12]}) than {source} "
                f"({fingerprint[:12]}): use another `out`"
            )
        if old.get("origin") != first:
            raise UserError(
                f"library {root} was built with names and goals of {before}: use another `out`, or the same `origin`"
            )
    for index, slots in spaces.items():
        now = layers.setdefault(str(index), {})
        for slot, space in slots.items():
            keys = {name: sub_block.key() for name, sub_block in space.items() if name != PARENT}
            now[slot] = now.get(slot, {}) | keys
    local = Path(source).exists()
    facts = {
        "puzzle": __version__,
        "parent": {
            "source": os.path.relpath(Path(source).absolute(), root.absolute()) if local else source,
            "relative": local,
            "name": _name(source, point),
            "fingerprint": fingerprint,
            "config_hash": content_hash(parent.config),
            **({} if point is None else {"point": asdict(point)}),
        },
        "structure": parent.structure.to_json(),
        **({} if first is None else {"origin": first}),
        "data": {
            "hash": data.hash,
            "num_documents": data.num_documents,
            "num_sequences": len(data.train),
            "seq_len": recipe.seq_len,
        },
        "recipe": asdict(recipe),
        "seed": seed,
        "layers": {index: layers[index] for index in sorted(layers, key=int)},
    }
    write_json(path, facts, SCHEMA)


def origin_facts(origin: HfModel) -> dict[str, Any]:
    """What library.json says of the model that names and goals are of."""
    return {"name": _name(origin.source, point_of(origin.directory)), "structure": origin.structure.to_json()}


def _name(source: str, point: Point | None) -> str:
    """Of the parent, as children's cards call it."""
    if point is not None:
        return f"{point.name}-{point.hidden_size}x{point.num_layers}"
    return Path(source).absolute().name if Path(source).exists() else source.replace("/", "--")
