"""What each serving engine takes of a child, in one table; needs no torch.

A row says what the engine's own reader of the format does, found by reading it: vLLM 0.32.0
(model_executor/models/nemotron_nas.py, llama.py), llama.cpp (src/models/deci.cpp, conversion of DeciLM), mlx-lm 0.32.2
(models/nemotron-nas.py), SGLang (srt/models/nemotron_nas.py, llama.py) and TensorRT-LLM
(_torch/models/modeling_nemotron_nas.py). `puzzle.export.lower` rewrites what a row lacks, or refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from puzzle.base.errors import UserError, nearest
from puzzle.base.units import parse_bytes

FORMATS = ("hf", "nemotron-nas", "gguf")
DTYPES = ("float32", "bfloat16", "float16")
OTHER_DTYPES = {"gguf": ("q8_0",)}  # by format; fp8 else


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """One engine; what its row does not name is as the format nemotron-nas has it. formats: those that it reads, the usual one first.

    first_layer: what layer 0 may have in place of softmax attention. attention_bias: "split" (q, k, v and o apart),
    "joint" (all four or none) or "none". windows: "one size" means that layers with a window share its length.
    any_head_dim: head_dim may differ from hidden_size / num_attention_heads. any_width: in nemotron-nas too, FFN widths need no
    multiple of WIDTH_STEP (in gguf they never do). fp8: it reads weights in fp8 of the compressed-tensors layout.
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


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            name="vllm",
            linear_attention=False,
            linear_ffn=False,
            first_layer="softmax attention",  # the residual stream starts in the first input_layernorm
            windows="one size",  # layer_types and sliding_window, read by its LlamaAttention
            any_width=True,
            fp8=True,
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
            linear_attention=False,  # read, but it takes a cache slot that stays empty, and masks come from slot 0
            attention_bias="joint",
            any_head_dim=False,
        ),
        Engine(
            name="sglang",
            linear_attention=False,
            linear_ffn=False,
            ffn_bias=False,
            attention_bias="joint",
            first_layer="softmax attention",
            equal_kv_heads=True,
            fp8=True,
        ),
        Engine(name="tensorrt-llm", ffn_bias=False, attention_bias="none"),
    )
}

# `--format nemotron-nas` without --engine: what the format itself has words for.
ANY_DECILM_READER = Engine(name="nemotron-nas", fp8=True)


def pick_format(format: str | None, engine: str | None) -> tuple[str, str | None]:
    """(format, engine) with the one that was left out filled in: hf, or the engine's usual format.

    Raises UserError for unknown names and for a format that the engine does not read.
    """
    if engine is not None and engine not in ENGINES:
        raise UserError(f"unknown engine '{engine}': {nearest(engine, list(ENGINES))}")
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format '{format}': {nearest(format, list(FORMATS))}")
    if format is None:
        return (ENGINES[engine].formats[0] if engine else "hf"), engine
    if engine is None:
        return format, "llama.cpp" if format == "gguf" else None
    if format not in ENGINES[engine].formats:
        readable = " or ".join(ENGINES[engine].formats)
        raise UserError(f"`engine` {engine} does not read `format` {format}: pass `format` {readable}")
    return format, engine


FP8_READERS = f"use `engine` {' or '.join(one.name for one in ENGINES.values() if one.fp8)}, or `format` hf"


def reads_fp8(format: str, engine: str | None) -> bool:
    """Whether compressed-tensors are read; by what reads a format where no engine is named."""
    return format != "gguf" and (engine is None or ENGINES[engine].fp8)


def check_dtypes(format: str, engine: str | None, dtype: str | None, kv_dtype: str | None) -> None:
    """Raise UserError for a dtype of weights or cache that the format has no tensors of, or that the engine does not read; None
    keeps the checkpoint's own."""
    known = [*DTYPES, *OTHER_DTYPES.get(format, ("fp8",))]
    if dtype is not None and dtype not in known:
        raise UserError(f"`dtype` {dtype} with `format` {format}: {nearest(dtype, known)}")
    if kv_dtype not in (None, "fp8"):
        raise UserError(f"`kv_dtype` {kv_dtype}: fp8 is; left out, an engine's cache is as its activations are")
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
    def name(self) -> str:
        """Of the place where it goes among other exports: what was asked for, as in mlx, gguf-q8_0, or vllm-fp8-kv-fp8."""
        cache = self.kv_dtype and f"kv-{self.kv_dtype}"
        return "-".join(filter(None, (self.engine, self.format, self.dtype, cache))) or "hf"
