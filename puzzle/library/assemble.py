"""Put a child together: for every layer the parent's own sub-block or a trained one from the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from puzzle.base.errors import UserError
from puzzle.base.files import read_json
from puzzle.blocklib.layer import KINDS
from puzzle.blocklib.variant import PARENT
from puzzle.library.manifest import Library
from puzzle.library.score import load_variant
from puzzle.library.store import BlockStore
from puzzle.parents.family import HfModel, open_model
from puzzle.runtime.model import Block, CausalModel, load_model

Choice = dict[str, str]


def read_architecture(path: Path, library: Library) -> dict[str, Any]:
    """architecture.json, checked against the library. `path` may be the file or the directory it is in.

    Raises UserError when it belongs to another parent, or names a variant that the library lacks.
    """
    path = path / "architecture.json" if path.is_dir() else path
    found = read_json(path, f"puzzle solve {library.root}")
    if found["library"]["parent_fingerprint"] != library.facts["parent"]["fingerprint"]:
        raise UserError(f"{path} was solved for another parent than that of library {library.root}: solve again")
    if len(found["layers"]) != library.num_layers:
        raise UserError(f"{path} has {len(found['layers'])} layers, the parent {library.num_layers}: solve again")
    for index, choice in enumerate(found["layers"]):
        for kind in KINDS:
            if choice.get(kind) not in library.variants(kind):
                raise UserError(
                    f"{path} layer {index} asks for {kind} '{choice.get(kind)}', which library {library.root} "
                    "lacks: build it, or solve again"
                )
    return found


def open_parent(library: Library, parent: str | None) -> HfModel:
    """The library's parent, its fingerprint checked."""
    source = library.parent_source(parent)
    opened = open_model(source)
    library.check_parent(opened.checkpoint.fingerprint(), source)
    return opened


def assemble(
    library: Library,
    layers: list[Choice],
    parent: HfModel,
    *,
    model: CausalModel | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CausalModel:
    """The child in memory. model: the parent already loaded on that device, whose weights the child then shares."""
    model = model or load_model(parent, device=device, dtype=dtype)
    store = BlockStore(library.root)
    blocks = []
    for index, choice in enumerate(layers):
        parts = {}
        for kind in KINDS:
            own = getattr(model.blocks[index], kind)
            name = choice[kind]
            parts[kind] = (
                own
                if name == PARENT
                else load_variant(
                    store, parent, index, kind, name, model.embedding.weight.device, model.embedding.weight.dtype
                )
            )
        blocks.append(Block(parts["attention"], parts["ffn"]))
    head = None if model.head is None else model.head.data
    child = CausalModel(model.spec, model.embedding.weight.data, blocks, model.norm.weight.data, head)
    return child.requires_grad_(False).eval()
