"""Where a child comes from: a library and an architecture, or a checkpoint on disk (what `--format hf` wrote, or any parent)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from puzzle.base.errors import UserError
from puzzle.blocklib.layer import KINDS, Kind, LayerSpec
from puzzle.export.child import (
    ABSENT,
    LINEAR,
    Absent,
    Attention,
    Child,
    ChildLayer,
    Ffn,
    Gqa,
    Read,
    SwiGlu,
    no_tensors,
    sub_block_shapes,
)
from puzzle.export.stream import StreamingCheckpoint
from puzzle.library.manifest import PARENT, Library
from puzzle.library.store import BlockStore
from puzzle.parents.family import HfModel, hf_name, open_model

Choice = dict[str, str]


def child_of_library(library: Library, layers: list[Choice], parent: HfModel) -> Child:
    """The child that picks `layers` (one {"attention": variant, "ffn": variant} each) from a library of `parent`."""
    entries: list[dict[str, Any]] = []
    for choice in layers:
        entry: dict[str, Any] = {}
        for kind in KINDS:
            for key, value in library.variant(kind, choice[kind])["hf"].items():
                entry[key] = entry.get(key, []) + value if isinstance(value, list) else value
        entries.append(entry)
    child = _from_hf(parent, entries, parent_name=library.facts["parent"]["name"])
    store = BlockStore(library.root)
    chosen = []
    for index, (layer, choice) in enumerate(zip(child.layers, layers, strict=True)):
        trained = {
            f"read_{kind}": partial(store.read, index, kind, choice[kind]) for kind in KINDS if choice[kind] != PARENT
        }
        chosen.append(replace(layer, **trained))  # type: ignore[arg-type]
    return replace(child, layers=tuple(chosen))


def child_of_checkpoint(source: str | Path | HfModel) -> Child:
    """The child (or parent) in a Hugging Face directory. Raises UserError as `open_model` does."""
    opened = source if isinstance(source, HfModel) else open_model(source)
    entries = {int(index): entry for index, entry in (opened.config.get("per_layer_config") or {}).items()}
    name = opened.config.get("parent_name") or Path(opened.source).absolute().name
    return _from_hf(opened, [entries.get(index, {}) for index in range(opened.num_layers)], parent_name=name)


def _from_hf(opened: HfModel, entries: list[dict[str, Any]], parent_name: str) -> Child:
    """A child with the shapes of `entries` (one per layer) and the tensors of one checkpoint."""
    config, spec, checkpoint = opened.config, opened.spec, StreamingCheckpoint(opened.directory)
    generation = opened.directory / "generation_config.json"

    def read(index: int, kind: Kind, shape: Attention | Ffn) -> Read:
        if isinstance(shape, Absent):
            return no_tensors
        return lambda: {name: checkpoint.tensor(hf_name(index, kind, name)) for name in sub_block_shapes(child, shape)}

    child = Child(
        name=Path(opened.source).absolute().name,
        layers=(),
        hidden_size=spec.hidden_size,
        vocab_size=opened.vocab_size,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        rms_norm_eps=spec.rms_norm_eps,
        max_position_embeddings=opened.max_length,
        rope_parameters=rope_parameters(config),
        tied=opened.tied,
        qkv_bias=spec.qkv_bias,
        o_bias=spec.o_bias,
        mlp_bias=spec.mlp_bias,
        qk_norm=spec.qk_norm,
        window=spec.window,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
        dtype=checkpoint.dtype("model.norm.weight"),
        tokenizer=opened.directory,
        generation_config=json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None,
        parent_name=parent_name,
        licence=licence_of(opened.directory),
        parent_config=config,
        read_embedding=partial(checkpoint.tensor, "model.embed_tokens.weight"),
        read_final_norm=partial(checkpoint.tensor, "model.norm.weight"),
        read_head=partial(checkpoint.tensor, "model.embed_tokens.weight" if opened.tied else "lm_head.weight"),
    )
    layers = []
    origins = _layer_origins(config, opened)
    for index, entry in enumerate(entries):
        attention, ffn = _shapes(entry, spec)
        layers.append(
            ChildLayer(
                attention=attention,
                ffn=ffn,
                read_attention=read(index, "attention", attention),
                read_ffn=read(index, "ffn", ffn),
                origin=index,
                parent_layer=origins[index],
            )
        )
    return replace(child, layers=tuple(layers))


def _layer_origins(config: dict[str, Any], opened: HfModel) -> Sequence[int | None]:
    """config.json's layer_origins, which fusion writes; None for every layer without it."""
    found = config.get("layer_origins")
    if found is None:
        return [None] * opened.num_layers
    numbers = isinstance(found, list) and all(isinstance(n, int) and n >= 0 for n in found)
    if not numbers or len(found) != opened.num_layers or found != sorted(set(found)):
        raise UserError(
            f"{opened.directory}/config.json has layer_origins {found}: one rising layer of the parent for each of the "
            f"{opened.num_layers} layers; export or fuse the child again"
        )
    return found


def _shapes(entry: dict[str, Any], spec: LayerSpec) -> tuple[Attention, Ffn]:
    """One entry of `per_layer_config`, in words of this file."""
    skip, linear = entry.get("skip") or [], entry.get("linear") or []
    attention: Attention = Gqa(
        num_key_value_heads=entry.get("num_key_value_heads", spec.num_key_value_heads),
        window=entry.get("sliding_window", spec.window),
    )
    ffn: Ffn = SwiGlu(width=entry.get("intermediate_size", spec.intermediate_size))
    return (
        ABSENT if "attention" in skip else LINEAR if "attention" in linear else attention,
        ABSENT if "mlp" in skip else LINEAR if "mlp" in linear else ffn,
    )


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The parent's RoPE in transformers' current spelling, whichever its config.json uses."""
    from transformers import LlamaConfig

    keys = (
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
    )
    return dict(LlamaConfig(**{k: config[k] for k in keys if config.get(k) is not None}).rope_parameters or {})


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
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return str(found) if found else None
