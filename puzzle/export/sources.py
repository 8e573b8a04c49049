"""Where a child comes from: a library and an architecture, or a checkpoint on disk (what `--format hf` wrote, or any parent)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from puzzle.base.errors import UserError
from puzzle.blocklib.variant import PARENT
from puzzle.export.child import Child, ChildLayer
from puzzle.library.manifest import Library, Replacement
from puzzle.library.store import BlockStore
from puzzle.parents.names import FINAL_NORM
from puzzle.parents.opened import HfModel, check_special, open_model

KEPT = ("hidden_act", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")  # of config.json


def child_of_library(library: Library, layers: Sequence[Replacement], parent: HfModel) -> Child:
    """The child that picks `layers` ({slot: variant} each) from a library of `parent`."""
    child = replace(child_of_checkpoint(parent), parent_name=library.name)
    store = BlockStore(library.root)
    chosen = []
    for index, (layer, replacement) in enumerate(zip(child.layers, layers, strict=True)):
        for slot, name in replacement.items():
            if name != PARENT:
                layer = layer.put(slot, library.spaces[index][slot][name], partial(store.read, index, slot, name))
        chosen.append(layer)
    return replace(child, layers=tuple(chosen))


def child_of_checkpoint(source: str | Path | HfModel) -> Child:
    """The child (or parent) in a Hugging Face directory. Raises UserError as `open_model` does."""
    opened = source if isinstance(source, HfModel) else open_model(source)
    config, structure, checkpoint = opened.config, opened.structure, opened.checkpoint
    generation = "generation_config.json"
    settings = checkpoint.read(generation) if (opened.directory / generation).is_file() else None
    check_special(settings or {}, structure.vocab_size, generation)
    origins = _layer_origins(opened)
    return Child(
        name=Path(opened.source).absolute().name,
        layers=tuple(
            ChildLayer(
                slots=layer,
                reads={slot: partial(opened.weights, index, slot) for slot in layer},
                origin=index,
                parent_layer=origins[index],
            )
            for index, layer in enumerate(structure.layers)
        ),
        around=structure.with_layers([]),
        base=opened.base,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
        dtype=checkpoint.dtype(FINAL_NORM),
        dequantised=checkpoint.quantised is not None,
        tokenizer=opened.directory,
        generation_config=settings,
        parent_name=config.get("parent_name") or Path(opened.source).absolute().name,
        licence=licence_of(opened.directory),
        kept={name: config[name] for name in KEPT if name in config},
        read_embedding=opened.embedding,
        read_final_norm=opened.final_norm,
        read_head=opened.lm_head,
    )


def _layer_origins(opened: HfModel) -> Sequence[int | None]:
    """config.json's layer_origins, which fusion writes; None for every layer without it."""
    found, count = opened.config.get("layer_origins"), opened.structure.num_layers
    if found is None:
        return [None] * count
    numbers = isinstance(found, list) and all(isinstance(n, int) and n >= 0 for n in found)
    if not numbers or len(found) != count or found != sorted(set(found)):
        raise UserError(
            f"{opened.directory}/config.json has layer_origins {found}: one rising layer of the parent for each of the "
            f"{count} layers; export or fuse the child again"
        )
    return found


def licence_of(directory: Path) -> str | None:
    """`license:` in the front matter of a checkpoint's README.md, None when there is none."""
    import yaml

    readme = directory / "README.md"
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # not ours: a key that stands twice costs no licence
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return str(found) if found else None
