"""What each serving engine takes of a child, in one table; needs no torch.

A row says what the engine's own reader of the format does, found by reading it: vLLM 0.18 to 0.32
(model_executor/models/nemotron_nas.py, llama.py), llama.cpp (src/models/deci.cpp, nemotron-h.cpp, their conversions), mlx-lm 0.32.2
(models/nemotron-nas.py), SGLang 0.5.23 (srt/models/nemotron_nas.py, llama.py) and TensorRT-LLM
(_torch/models/modeling_nemotron_nas.py). `puzzle.export.lower` rewrites what a row lacks, or refuses.
An engine is asked for as NAME or NAME==VERSION (`engine_named`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from puzzle.base.errors import UserError, nearest
from puzzle.base.units import parse_bytes

PLAIN_HYBRID, PUZZLE_HYBRID = HYBRIDS = ("nemotron-h", "nemotron-h-puzzle")  # formats of blocks of one mixer
GRANITE_HYBRID = "granitemoehybrid"  # of layers with attention or Mamba-2, and one FFN
# Formats of model families that are alike in all layers, which say themselves what they have no words for.
STOCK = ("qwen3-moe", "gpt-oss", GRANITE_HYBRID)
WITHOUT_SCALES = (*HYBRIDS, "gpt-oss")  # of a cache: readers pass over them
SCALES_FROM = "0.32"  # the first vLLM that was seen to read them in a stock format: earlier ones pass over those of Qwen3-MoE without a
# word, or end; SGLang ends, and transformers takes all experts of a section of compressed-tensors to be quantised
FORMATS = ("hf", "nemotron-nas", *STOCK, "gguf", *HYBRIDS)
DTYPES = ("float32", "bfloat16", "float16")
OTHER_DTYPES = {"gguf": ("q8_0",), **dict.fromkeys(STOCK, ())}  # by format; fp8 else


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One engine; what its row does not name is as the format nemotron-nas has it. formats: those that it reads, the usual one first.

    first_layer: what layer 0 may have in place of softmax attention. attention_bias: "split" (q, k, v and o apart),
    "joint" (all four or none) or "none". windows: "one size" means that layers with a window share its length.
    any_head_dim: head_dim may differ from hidden_size / num_attention_heads. any_width: in nemotron-nas too, FFN widths need no
    multiple of WIDTH_STEP (in gguf they never do). fp8: it reads weights in fp8 of the compressed-tensors layout.
    read: its oldest and newest version whose source was read; None where versions are not told apart. mixed_kv_heads: the first
    version that is right where layers differ in KV heads, None where every one is or refuses them itself. plug_in: the first
    version that serves format hf through our plug-in.
    """

    name: str
    formats: tuple[str, ...] = ("nemotron-nas",)
    linear_attention: bool = True
    linear_ffn: bool = True
    ffn_bias: bool = True
    attention_bias: Literal["split", "joint", "none"] = "split"
    first_layer: Literal["anything", "linear attention", "softmax attention"] = "anything"
    ffn_required: bool = False  # a layer without FFN loses what its attention adds
    equal_kv_heads: bool = False
    windows: Literal["one size", "none"] = "none"
    any_head_dim: bool = True
    any_width: bool = False
    fp8: bool = False
    read: tuple[str, str] | None = None
    mixed_kv_heads: str | None = None
    plug_in: str | None = None


CARD_SHARE = 0.92  # of a GPU's memory that a serving engine takes: vLLM's gpu_memory_utilization unless told otherwise
ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            formats=("nemotron-nas", *STOCK, *HYBRIDS),
            linear_attention=False,
            linear_ffn=False,
            first_layer="softmax attention",  # the residual stream starts in the first input_layernorm
            windows="one size",  # layer_types and sliding_window, read by its LlamaAttention
            any_width=True,
            fp8=True,
            read=("0.18", "0.32"),  # before, FFN widths of their own and windows by layer are not read
            mixed_kv_heads="0.29",  # before, FlashAttention 3 is planned with the first layer's KV heads for all
            plug_in="0.26",
        ),
        Engine(
            name="llama.cpp",
            formats=("gguf", "nemotron-nas"),
            linear_ffn=False,
            first_layer="linear attention",  # head sizes are derived from layer 0's number of heads
            ffn_required=True,
        ),
        Engine(
            name="mlx",
            formats=("nemotron-nas", GRANITE_HYBRID, PLAIN_HYBRID),
            linear_attention=False,  # read, but it takes a cache slot that stays empty, and masks come from slot 0
            attention_bias="joint",
            any_head_dim=False,
            read=("0.32.2", "0.32.2"),
        ),
        Engine(
            name="sglang",
            formats=("nemotron-nas", GRANITE_HYBRID, *HYBRIDS),
            linear_attention=False,
            linear_ffn=False,
            ffn_bias=False,
            attention_bias="joint",
            first_layer="softmax attention",
            equal_kv_heads=True,  # it raises ValueError otherwise, since its first reader in 0.5.1
            fp8=True,
            read=("0.5.23", "0.5.23"),
        ),
        Engine(name="tensorrt-llm", formats=("nemotron-nas", *HYBRIDS), ffn_bias=False, attention_bias="none"),
    )
}

# `--format nemotron-nas` without --engine: what the format itself has words for.
ANY_DECILM_READER = Engine(name="nemotron-nas", fp8=True)


def engine_named(text: str) -> Engine:
    """The row of NAME, or of NAME==VERSION as that version has it. Raises UserError for what is unknown or cannot be read."""
    name, asked, version = text.partition("==")
    if name not in ENGINES:
        raise UserError(f"unknown engine '{name}': {nearest(name, ENGINES)}")
    row = ENGINES[name]
    if not asked:
        return row
    if row.read is None:
        raise UserError(f"`engine` {text}: versions of {name} are not told apart: write `engine` {name}")
    oldest, newest = row.read
    numbers = release(version)
    if numbers is None:
        raise UserError(f"`engine` {text}: '{version}' is no release: write it as in {name}=={newest}")
    last = _numbers(newest)
    if numbers < _numbers(oldest) or numbers[: len(last)] > last:
        between = newest if oldest == newest else f"{oldest} to {newest}"
        raise UserError(f"`engine` {text}: what {name} takes was read in {between} alone: name such a version, or none")
    lacks = row.mixed_kv_heads is not None and numbers < _numbers(row.mixed_kv_heads)
    return replace(row, equal_kv_heads=row.equal_kv_heads or lacks)


def release(version: str) -> tuple[int, ...] | None:
    """(0, 26, 1) of 0.26.1, 0.26.1.post1 or 0.26.1+cu130; None for what is no release, such as 0.29.0rc1."""
    found = re.fullmatch(r"(\d+(?:\.\d+)+)(?:\.post\d+)?(?:\+[\w.]+)?", version)
    return None if found is None else _numbers(found[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def wrong_before(engine: Engine, kv_heads: Collection[int]) -> str | None:
    """The first version that is right for a nemotron-nas child whose layers have these KV heads; None where all are."""
    return engine.mixed_kv_heads if len(set(kv_heads)) > 1 else None


def served_by(engine: Engine, kv_heads: Collection[int]) -> str:
    """Which versions of an engine serve a nemotron-nas child with these KV heads; "" where versions are not told apart."""
    if engine.read is None:
        return ""
    name, (oldest, newest) = engine.name, engine.read
    first = wrong_before(engine, kv_heads)
    if first is None:
        versions = newest if oldest == newest else f"{oldest} to {newest}"
        return f"read against the sources of {name} {versions}, which serve it"
    counts = ", ".join(map(str, sorted(set(kv_heads))))
    return (
        f"layers differ in KV heads ({counts}): on a GPU it takes {name} >= {first}; before, FlashAttention 3 answers wrongly, "
        f"without a message. For {name} {engine.plug_in} and newer: the --format hf export, through puzzle's plug-in; or "
        f"--engine {name}=={engine.plug_in}, which repeats KV heads until all layers have as many"
    )


def pick_format(format: str | None, engine: str | None) -> tuple[str, str | None]:
    """(format, engine) with the one that was left out filled in: hf, or the engine's usual format.

    Raises UserError for unknown names and for a format that the engine does not read.
    """
    formats = () if engine is None else engine_named(engine).formats
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format '{format}': {nearest(format, FORMATS)}")
    if format is None:
        return (formats[0] if formats else "hf"), engine
    if engine is None:
        return format, "llama.cpp" if format == "gguf" else None
    if format not in formats:
        raise UserError(f"`engine` {engine} does not read `format` {format}: pass `format` {' or '.join(formats)}")
    return format, engine


FP8_READERS = f"use `engine` {' or '.join(one.name for one in ENGINES.values() if one.fp8)}, or `format` hf"


def reads_fp8(format: str, engine: str | None) -> bool:
    """Whether compressed-tensors are read; by what reads a format where no engine is named."""
    return format not in ("gguf", *HYBRIDS) and (engine is None or engine_named(engine).fp8)


def _reads_scales(engine: str | None) -> bool:
    """Of a cache, in a stock format."""
    name, _, version = (engine or "").partition("==")
    return name == "vllm" and (not version or (release(version) or ()) >= _numbers(SCALES_FROM))


def check_dtypes(format: str, engine: str | None, dtype: str | None, kv_dtype: str | None) -> None:
    """Raise UserError for a dtype of weights or cache that the format has no tensors of, or that the engine does not read; None
    keeps the checkpoint's own."""
    known = [*DTYPES, *OTHER_DTYPES.get(format, () if format in HYBRIDS else ("fp8",))]
    if dtype is not None and dtype not in known:
        raise UserError(f"`dtype` {dtype} with `format` {format}: {nearest(dtype, known)}")
    if kv_dtype not in (None, "fp8"):
        raise UserError(f"`kv_dtype` {kv_dtype}: fp8 is; left out, an engine's cache is as its activations are")
    if kv_dtype is not None and format in WITHOUT_SCALES:
        raise UserError(f"`kv_dtype` {kv_dtype}: `format` {format} has no scales of a cache here: leave it out")
    if kv_dtype is not None and format in STOCK and not _reads_scales(engine):
        raise UserError(
            f"`kv_dtype` {kv_dtype} with `format` {format}: {engine or 'its readers'} may not read the cache's scales: pass `engine` vllm, of "
            f"which {SCALES_FROM} and newer do, or leave it out"
        )
    for name in [n for n, value in (("dtype", dtype), ("kv_dtype", kv_dtype)) if value == "fp8"]:
        if not reads_fp8(format, engine):
            raise UserError(f"`{name}` fp8: {engine} reads none of compressed-tensors: {FP8_READERS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """One export, as `puzzle export` takes it. Raises UserError for names that are not known or do not go together."""

    format: str | None = None
    engine: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    licence: str | None = None
    max_shard: str = "4GiB"

    def __post_init__(self) -> None:
        format, engine = self.picked
        check_dtypes(format, engine, self.dtype, self.kv_dtype)
        parse_bytes(self.max_shard, "max_shard")
        if format == "gguf" and self.max_shard != "4GiB":
            raise UserError("`max_shard` is not used with `format` gguf: leave it out")

    @property
    def picked(self) -> tuple[str, str | None]:
        return pick_format(self.format, self.engine)

    @property
    def is_the_child(self) -> bool:
        """Whether nothing is asked for that the child of a run has not already."""
        return self.picked[0] == "hf" and self == ExportOptions(format=self.format)

    @property
    def name(self) -> str:
        """Of the place where it goes among other exports: what was asked for, as in mlx, gguf-q8_0, or vllm-fp8-kv-fp8."""
        cache, engine = self.kv_dtype and f"kv-{self.kv_dtype}", self.engine and self.engine.replace("==", "-")
        return "-".join(filter(None, (engine, self.format, self.dtype, cache))) or "hf"
