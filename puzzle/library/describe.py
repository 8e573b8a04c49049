"""library.json, written: the facts of a parent and of the variants that a library offers."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from puzzle import __version__
from puzzle.base.errors import UserError
from puzzle.base.files import content_hash, read_json, write_json
from puzzle.blocklib.distill import Recipe
from puzzle.blocklib.layer import KINDS, Kind, LayerSpec
from puzzle.blocklib.variant import parse_variant
from puzzle.data.packing import TokenData
from puzzle.parents.family import HfModel


def describe_variant(kind: Kind, name: str, spec: LayerSpec) -> dict:
    """What library.json says of a variant: all that `solve` needs of it."""
    variant = parse_variant(kind, name, spec)
    return {**asdict(variant.footprint(spec)), "shape": variant.shape(spec), "hf": variant.to_hf(spec)}


def model_facts(parent: HfModel) -> dict:
    """Whole-model numbers that `solve` needs; tied embeddings count once."""
    embedding = parent.vocab_size * parent.spec.hidden_size
    spec = asdict(parent.spec)
    del spec["inv_freq"]
    return {
        "num_layers": parent.num_layers,
        "vocab_size": parent.vocab_size,
        "max_length": parent.max_length,
        "tied": parent.tied,
        "num_fixed_parameters": embedding * (1 if parent.tied else 2) + parent.spec.hidden_size,
        "head_shape": f"h{parent.spec.hidden_size} v{parent.vocab_size}",
        "spec": spec,
    }


def write_library(
    root: Path,
    parent: HfModel,
    data: TokenData,
    recipe: Recipe,
    seed: int,
    layers: list[int],
    space: dict[Kind, list[str]],
) -> None:
    """library.json: new, or the same parent with the search space widened. Raises UserError for another parent."""
    fingerprint = parent.checkpoint.fingerprint()
    path, source = root / "library.json", parent.source
    local = Path(source).exists()
    variants = {kind: {name: describe_variant(kind, name, parent.spec) for name in space[kind]} for kind in KINDS}
    chosen = set(layers)
    if path.is_file():
        old = read_json(path, "puzzle build-library")
        theirs = old["parent"]["fingerprint"]
        if theirs != fingerprint:
            raise UserError(
                f"library {root} was built from another parent (fingerprint {theirs[:12]}) than {source} "
                f"({fingerprint[:12]}): use another --out"
            )
        variants = {kind: old["variants"][kind] | variants[kind] for kind in KINDS}
        chosen |= set(old["layers"])
    facts = {
        "puzzle": __version__,
        "parent": {
            "source": os.path.relpath(Path(source).absolute(), root.absolute()) if local else source,
            "relative": local,
            "name": Path(source).absolute().name if local else source.replace("/", "--"),
            "fingerprint": fingerprint,
            "config_hash": content_hash(parent.config),
        },
        "model": model_facts(parent),
        "data": {
            "hash": data.hash,
            "num_documents": data.num_documents,
            "num_sequences": len(data.train),
            "seq_len": recipe.seq_len,
        },
        "recipe": asdict(recipe),
        "seed": seed,
        "layers": sorted(chosen),
        "variants": variants,
    }
    write_json(path, facts)
