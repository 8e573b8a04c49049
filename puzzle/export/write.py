"""`puzzle export`: a library and an architecture, or a child on disk, into the format that an engine reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.console import say
from puzzle.base.device import compute_dtype, pick_device
from puzzle.base.errors import UserError, first_line, writing
from puzzle.base.files import SCHEMA, claim_output, read_json
from puzzle.export.card import CardFacts, child_card
from puzzle.export.checkpoint import DECILM_CODE, HYBRID_CODE, copy_companions, publishing, write_checkpoint
from puzzle.export.child import Child, with_dtype
from puzzle.export.engines import (
    ENGINES,
    FP8_READERS,
    GRANITE_HYBRID,
    HYBRIDS,
    PUZZLE_HYBRID,
    check_dtypes,
    engine_named,
    pick_format,
    reads_fp8,
    served_by,
    wrong_before,
)
from puzzle.export.fp8 import Scales, cache_tensors, calibrate, check_kinds, in_fp8, kept_in_bf16, quantization_config
from puzzle.export.gguf import export_gguf
from puzzle.export.gpt_oss import GPT_OSS, gpt_oss_config, gpt_oss_tensors
from puzzle.export.granite_hybrid import granite_hybrid_config, granite_hybrid_tensors
from puzzle.export.hf import hf_config
from puzzle.export.lower import Lowering, lower
from puzzle.export.nemotron_h import hybrid_config, hybrid_tensors
from puzzle.export.nemotron_nas import decilm_config, decilm_tensors
from puzzle.export.qwen3_moe import qwen3_moe_config, qwen3_moe_tensors
from puzzle.export.sources import child_of_checkpoint, child_of_library
from puzzle.library.assemble import architecture_of, is_architecture, library_of, open_parent
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Architecture, architecture_beside

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_GGUF_DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "q8_0": "q8_0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is exported. solved: its architecture.json; recipe: library.json's facts, None for a child on disk."""

    child: Child
    solved: Architecture | None
    facts: dict[str, Any] | None
    measured: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written. engine: None when any reader of the format was meant."""

    out: Path
    format: str
    engine: str | None
    dtype: str
    kv_dtype: str | None
    lowerings: tuple[Lowering, ...]


def open_source(source: Path, architecture: Path | None = None, parent: str | None = None) -> Source:
    """A library with an architecture, an architecture in its library, or a checkpoint. Raises UserError for anything else."""
    if architecture is None and is_architecture(source):
        source, architecture = library_of(source), source
    if (source / "library.json").is_file() or architecture is not None:
        library = Library.open(source)
        if architecture is None:
            raise UserError(
                f"{source} is a library: say which child of it, as in `puzzle export {source} {source}/solution --out CHILD`"
            )
        solved = architecture_of(architecture, library)
        child = child_of_library(library, solved.variants, open_parent(library, parent))
        return Source(child=child, solved=solved, facts=library.facts, measured=None)
    if parent is not None:
        raise UserError(f"`parent` belongs to a library, and {source} is none: leave it out")
    child, path = child_of_checkpoint(source), source / "evaluation.json"
    measured = read_json(path, "puzzle export") if path.is_file() else None
    return Source(child=child, solved=architecture_beside(source), facts=None, measured=measured)


def export(
    source: Source,
    out: Path,
    *,
    format: str | None = None,
    engine: str | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    data: list[str] | None = None,
    text_field: str = "text",
    device: str = "auto",
    licence: str | None = None,
    measured: dict[str, Any] | None = None,
    force: bool = False,
    max_shard_bytes: int = 4 * 2**30,
    push_to_hub: str | None = None,
) -> Exported:
    """Write the child to `out`, sub-block by sub-block, and say what it took.

    format: one of `FORMATS`; engine: the one that will read it. Either may be left out (`pick_format`).
    dtype: float32, bfloat16, float16 or fp8, and q8_0 for gguf; None is what was solved for, where precision was chosen, else the
    checkpoint's own, bf16 of one in fp8. kv_dtype: fp8
    calibrates the cache's scales on `data`. measured: what `puzzle evaluate --json` printed, for the card. out: a directory;
    with gguf also a file name that ends in .gguf.
    Raises UserError before anything is written when the engine cannot take the child.
    """
    format, engine = pick_format(format, engine)
    if dtype is None and source.solved is not None and source.solved.kv_dtype is not None:
        source, dtype = _as_solved(source, source.solved, format, engine, kv_dtype)
    if out.suffix == ".gguf" and format != "gguf":
        raise UserError(
            f"`out` {out} is a gguf file's name, and `format` is {format}: pass `format` gguf, or a directory"
        )
    check_dtypes(format, engine, dtype, kv_dtype)
    if kv_dtype is not None and not data:
        raise UserError("`kv_dtype` fp8: the cache's scales are calibrated on text: pass `data`")
    whole = _in_dtype(source.child if licence is None else replace(source.child, licence=licence), dtype, format)
    child, lowerings = lower(whole, engine, format, kv_bytes=1 if kv_dtype else None)
    hub = None if push_to_hub is None else open_hub(push_to_hub)
    scales = {}
    if kv_dtype is not None:
        claim_output(out, force, [child.tokenizer, *(data or [])])
        on = pick_device(device)
        scales = calibrate(whole, data or [], text_field, on, compute_dtype(on))
    name, any_reader = engine and engine_named(engine).name, format == "nemotron-nas" and engine is None
    readers = takers(child, fp8="fp8" in (dtype, kv_dtype)) if any_reader else [name] if name else []
    written = dtype or child.dtype_name
    facts = CardFacts(
        child=child,
        original=source.child,
        format=format,
        engine=name,
        dtype=written,
        kv_dtype=kv_dtype,
        file=_gguf_name(out, written) if format == "gguf" else None,
        licence=child.licence,
        lowerings=tuple(str(lowering) for lowering in lowerings),
        also=tuple(readers) if any_reader else (),
        solved=source.solved,
        facts=source.facts,
        # what stands beside a child was measured before its weights were rounded
        measured=measured if dtype == "fp8" else measured or source.measured,
    )
    if format == "gguf":
        _write_gguf(facts, out, force)
    else:
        _write_directory(facts, scales, out, max_shard_bytes, force)
    for lowering in lowerings:
        say(f"lowered for {engine or format}: {lowering}")
    for one in readers if engine == name else ():  # whoever names a version knows
        if wrong_before(ENGINES[one], child.kv_heads):
            say(f"{one}: {served_by(ENGINES[one], child.kv_heads)}")
    if hub is not None and push_to_hub is not None:
        _push(hub, push_to_hub, out)
    return Exported(out=out, format=format, engine=engine, dtype=written, kv_dtype=kv_dtype, lowerings=tuple(lowerings))


def _in_dtype(child: Child, dtype: str | None, format: str) -> Child:
    if dtype in DTYPES:
        return with_dtype(child, DTYPES[dtype])
    if dtype == "fp8":
        check_kinds(child)
        return replace(child, dtype=torch.bfloat16, dequantised=False)  # `in_fp8` wants what the reads give
    return child if format == "hf" else with_dtype(child, child.dtype)  # engines compute in what they find


def _write_directory(facts: CardFacts, scales: Scales, out: Path, max_shard_bytes: int, force: bool) -> None:
    """A checkpoint, with what its card is made of beside it."""
    child, weights, cache = facts.child, facts.dtype == "fp8", facts.kv_dtype == "fp8"
    config, tensors, code = _written(child, facts.format, facts.engine)
    kept = kept_in_bf16(child)
    if weights or cache:
        config["quantization_config"] = quantization_config(weights, cache, kept)
    told = None if facts.solved is None else facts.solved.to_json()
    records = {"architecture.json": told, "evaluation.json": facts.measured}
    write_checkpoint(
        out,
        config=config,
        tensors=chain(in_fp8(tensors, kept) if weights else tensors, cache_tensors(child, scales) if scales else ()),
        tokenizer_from=child.tokenizer,
        generation_config=child.generation_config,
        card=child_card(facts),
        extra_json={name: {"schema": SCHEMA, **record} for name, record in records.items() if record is not None},
        code=code,
        max_shard_bytes=max_shard_bytes,
        force=force,
    )


def _written(
    child: Child, format: str, engine: str | None
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]], Sequence[Path] | None]:
    """config.json, tensors and model code in a format of directories."""
    if format == "qwen3-moe":
        return qwen3_moe_config(child), qwen3_moe_tensors(child), ()
    if format == GPT_OSS:
        return gpt_oss_config(child), gpt_oss_tensors(child), ()
    if format == GRANITE_HYBRID:
        return granite_hybrid_config(child, engine), granite_hybrid_tensors(child), ()
    if format in HYBRIDS:
        code = HYBRID_CODE if format == PUZZLE_HYBRID else ()
        return hybrid_config(child, format, engine), hybrid_tensors(child, format), code
    if format == "nemotron-nas":
        return decilm_config(child, engine), decilm_tensors(child, engine), DECILM_CODE
    return hf_config(child, child.dtype), child.tensors(), None


def _as_solved(
    source: Source, solved: Architecture, format: str, engine: str | None, kv_dtype: str | None
) -> tuple[Source, str | None]:
    """The source with what stays in bf16 marked, and its dtype: fp8, or None where all weights are as they were.

    Raises UserError where that cannot be written, or needs `kv_dtype` too.
    """
    told = f"{source.child.name} was solved for {solved.precision}"
    if solved.kv_dtype == "fp8" and kv_dtype is None:
        raise UserError(f"{told}: pass `kv_dtype` fp8 with `data`, or the `dtype` of all weights")
    if not solved.fp8_weights:
        return source, None
    if not reads_fp8(format, engine):
        raise UserError(f"{told}, and {engine} reads no fp8: {FP8_READERS}, or pass the `dtype` of all weights")
    layers = source.child.layers
    if not solved.matches([layer.slots for layer in layers]):
        raise UserError(f"{told}, and has been fused or rewritten since: pass the `dtype` of all weights")
    marked = tuple(
        replace(layer, bf16=frozenset(slot for slot in layer.slots if (index, slot) not in solved.fp8_weights))
        for index, layer in enumerate(layers)
    )
    return replace(source, child=replace(source.child, layers=marked)), "fp8"


def takers(child: Child, fp8: bool) -> list[str]:
    """Engines that read this very nemotron-nas checkpoint: those for which nothing would be written differently."""
    found = []
    for name in [name for name, engine in ENGINES.items() if engine.fp8 or not fp8]:  # all read this format
        try:
            _, lowerings = lower(child, name, "nemotron-nas")
        except UserError:
            continue
        if not lowerings and decilm_config(child, name) == decilm_config(child, None):
            found.append(name)
    return found


def _gguf_name(out: Path, dtype: str) -> str:
    return out.name if out.suffix == ".gguf" else f"{out.name}-{_GGUF_DTYPES[dtype]}.gguf"


def _write_gguf(facts: CardFacts, out: Path, force: bool) -> None:
    """A file alone where `out` names one; else a directory with file, card, tokenizer and manifest."""
    child, dtype = facts.child, _GGUF_DTYPES[facts.dtype]
    if out.suffix == ".gguf":
        export_gguf(child, out, dtype=dtype, force=force)
        return
    card = child_card(facts)
    with publishing(out, force, [child.tokenizer]) as temporary:
        export_gguf(child, temporary / (facts.file or out.name), dtype=dtype, force=True)
        with writing(out):
            (temporary / "README.md").write_text(card, encoding="utf-8")
            copy_companions(child.tokenizer, temporary)


def open_hub(repository: str) -> Any:
    """A client that may write to `repository`. Raises UserError without network, login or a name like "me/child"."""
    from huggingface_hub import HfApi

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"`push_to_hub` {repository}: write it as NAME/MODEL, such as me/child")
    client = HfApi()
    try:
        client.whoami()
    except Exception as error:  # the client raises many kinds; all mean that nothing can be pushed
        raise UserError(
            f"`push_to_hub` {repository}: the hub does not know who you are ({first_line(error)}): run `hf auth login` or set "
            "HF_TOKEN, with a network; or leave the option out"
        ) from error
    return client


def _push(client: Any, repository: str, out: Path) -> None:
    try:
        client.create_repo(repository, exist_ok=True)
        if out.is_dir():
            client.upload_folder(repo_id=repository, folder_path=str(out))
        else:
            client.upload_file(repo_id=repository, path_or_fileobj=str(out), path_in_repo=out.name)
    except Exception as error:
        raise UserError(
            f"`push_to_hub` {repository} failed ({first_line(error)}); {out} is complete: push it with "
            f"`hf upload {repository} {out}`"
        ) from error
