"""What an exported file should compute: any of our export formats, read back into the plain forward of puzzle/runtime/model.py.

The shape of every sub-block is taken from the tensors that are there, not from the configuration that engines read: a
configuration that says something else shows as a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.gguf_hybrid import ARCHITECTURES as HYBRID_FILES
from puzzle.parents.checkpoint import Checkpoint
from puzzle.parents.names import EMBEDDING, FINAL_NORM, HEAD, MODULES, hf_name
from puzzle.parents.nemotron_nas import rope_of
from puzzle.parents.opened import open_model
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Layer, Structure
from puzzle.runtime.model import Block, CausalModel, load_model
from puzzle.serving.reference_hybrid import load_hybrid_gguf

FORMATS = {"puzzle": "hf", "nemotron-nas": "nemotron-nas"}


@dataclass(frozen=True, kw_only=True)
class Export:
    """path: the directory or .gguf file; format: hf, nemotron-nas, gguf, or parent (a supported checkpoint that we did not
    write); dtype: what an engine computes in: float32, or for .gguf files the type of their matrices. rounds: "fp8" or "MXFP4", to which
    engines round activations or cache as they come. kv_heads: of its layers with attention, where an engine's own reader reads them."""

    path: Path
    format: str
    dtype: str
    vocab_size: int
    max_length: int
    rounds: str | None = None
    kv_heads: tuple[int, ...] = ()


def find_export(path: Path) -> Export:
    """Recognise what `puzzle export` wrote. Raises UserError when it is none of its formats."""
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} .gguf files ({', '.join(f.name for f in files)}): give one of them")
    if files:
        return _gguf_export(files[0])
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give the directory or the .gguf file that `puzzle export` wrote")
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    format, attends = FORMATS.get(str(config.get("model_type")), "parent"), []
    if format != "nemotron-nas":  # raises for what is neither a child nor a supported parent
        attends = [b.num_key_value_heads for _, _, b in open_model(path).structure if isinstance(b, Gqa)]
    return Export(
        path=path,
        format=format,
        dtype="float32",
        vocab_size=int(config["vocab_size"]),
        max_length=int(config.get("max_position_embeddings", 2048)),
        rounds="MXFP4" if checkpoint.mxfp4 else "fp8" if config.get("quantization_config") else None,
        kv_heads=tuple(attends if format == "parent" else ())
        or tuple(
            int(config["num_attention_heads"]) // one["attention"]["n_heads_in_group"]
            for one in config.get("block_configs", ())
            if one.get("attention", {}).get("n_heads_in_group")
        ),
    )


def load_reference(export: Export) -> CausalModel:
    """The whole export in float32 on the CPU."""
    loaders = {"gguf": _load_gguf, "nemotron-nas": _load_nemotron_nas}
    return loaders.get(export.format, load_model)(export.path)


def _load_nemotron_nas(path: Path) -> CausalModel:
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    length = int(config["max_position_embeddings"])
    kinds = config.get("layer_types") or []
    return _model(
        # mlx-lm has its own name for the matrix of a linear FFN.
        {name.replace(".mlp.linear.", ".mlp.linear_mlp."): checkpoint.tensor(name) for name in checkpoint.names},
        num_layers=int(config["num_hidden_layers"]),
        norm_eps=float(config["rms_norm_eps"]),
        rope=Rope(head_dim=head_dim, max_length=length, parameters=rope_of(config)),
        windows={i: int(config["sliding_window"]) for i, kind in enumerate(kinds) if kind == "sliding_attention"},
    )


def _gguf_export(path: Path) -> Export:
    values, tensors = read_gguf(path)
    embedding = tensors["token_embd.weight"]
    length = int(values[f"{values['general.architecture']}.context_length"])
    dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}
    dtype = dtypes.get(embedding.tensor_type.name, "?")
    return Export(path=path, format="gguf", dtype=dtype, vocab_size=int(embedding.shape[1]), max_length=length)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors (memory-mapped) of a GGUF file that we write. Raises UserError otherwise."""
    try:
        import gguf
    except ImportError:
        raise UserError("reading .gguf files needs the package gguf: pip install 'puzzle-nas[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): export it again") from error
    values = {name: field.contents() for name, field in reader.fields.items()}
    if values.get("general.architecture") not in ("deci", *HYBRID_FILES):
        raise UserError(
            f"{path} has architecture '{values.get('general.architecture')}': serve-check reads those that puzzle writes, "
            f"deci, {' and '.join(HYBRID_FILES)}"
        )
    return values, {tensor.name: tensor for tensor in reader.tensors}


def _load_gguf(path: Path) -> CausalModel:
    from gguf.quants import dequantize

    from puzzle.export.gguf import TENSOR_NAMES, permute

    values, stored = read_gguf(path)
    if values["general.architecture"] in HYBRID_FILES:
        whole = {n: torch.from_numpy(dequantize(t.data, t.tensor_type).astype("float32")) for n, t in stored.items()}
        return load_hybrid_gguf(values, whole)
    names = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
    heads, kv_heads = values["deci.attention.head_count"], values["deci.attention.head_count_kv"]
    for index in range(int(values["deci.block_count"])):
        linear = heads[index] and not kv_heads[index]
        for (slot, name), gguf_name in TENSOR_NAMES.items():
            if name != ("o_proj.weight" if linear else "linear.weight"):  # these two have one name there
                names[f"blk.{index}.{gguf_name}"] = _name(index, slot, name)
    dim = int(values["deci.attention.key_length"])
    tensors = {}
    for gguf_name in names.keys() & stored.keys():
        name, found = names[gguf_name], stored[gguf_name]
        tensors[name] = torch.from_numpy(dequantize(found.data, found.tensor_type).astype("float32"))
        if ".q_proj." in name or ".k_proj." in name:
            tensors[name] = permute(tensors[name], len(tensors[name]) // dim, inverse=True)
    return _model(
        tensors,
        num_layers=int(values["deci.block_count"]),
        norm_eps=float(values["deci.attention.layer_norm_rms_epsilon"]),
        rope=StoredRope(
            head_dim=dim,
            max_length=int(values["deci.context_length"]),
            parameters={"rope_theta": float(values["deci.rope.freq_base"])},
            factors=stored["rope_freqs.weight"].data.tolist() if "rope_freqs.weight" in stored else None,
            scaling=float(values.get("deci.rope.scaling.attn_factor", 1.0)),
        ),
        windows={},
    )


def _model(
    tensors: Mapping[str, Tensor], *, num_layers: int, norm_eps: float, rope: Rope, windows: Mapping[int, int]
) -> CausalModel:
    """A model from what tensors do not tell, and all tensors by their Hugging Face names. windows: of layers that have one."""
    layers, blocks = [], []
    for index in range(num_layers):
        layer = _layer(index, tensors, norm_eps, rope.head_dim, windows.get(index))
        parts = {}
        for slot, sub_block in layer.items():
            weights = {name: tensors[hf_name(index, slot, sub_block, name)].float() for name in sub_block.tensors()}
            parts[slot] = loaded(sub_block, weights)
        layers.append(layer)
        blocks.append(Block(parts))
    embedding, head = tensors[EMBEDDING].float(), tensors[HEAD].float() if HEAD in tensors else None
    structure = Structure(
        hidden_size=embedding.shape[1],
        vocab_size=len(embedding),
        max_length=rope.max_length,
        tied=head is None,
        norm_eps=norm_eps,
        ropes={"default": rope},
        layers=tuple(layers),
    )
    return CausalModel(structure, embedding, blocks, tensors[FINAL_NORM].float(), head).requires_grad_(False).eval()


def _name(index: int, slot: str, name: str) -> str:
    """The Hugging Face name of a tensor of a sub-block with a norm before it, whatever its kind."""
    return hf_name(index, slot, NO_OP, name)


def _layer(index: int, tensors: Mapping[str, Tensor], norm_eps: float, head_dim: int, window: int | None) -> Layer:
    """What the layer's tensors say."""

    def rows(slot: str, name: str) -> int:
        """0 where there is no such tensor."""
        return len(tensors.get(_name(index, slot, name), ()))

    hidden = tensors[EMBEDDING].shape[1]
    linear = Linear(hidden_size=hidden, norm_eps=norm_eps)
    layer: dict[str, SubBlock] = {slot: linear if rows(slot, "linear.weight") else NO_OP for slot in MODULES}
    if keys := rows("attention", "k_proj.weight"):
        layer["attention"] = Gqa(
            hidden_size=hidden,
            num_attention_heads=rows("attention", "q_proj.weight") // head_dim,
            num_key_value_heads=keys // head_dim,
            head_dim=head_dim,
            window=window,
            qkv_bias=rows("attention", "q_proj.bias") > 0,
            o_bias=rows("attention", "o_proj.bias") > 0,
            norm_eps=norm_eps,
        )
    if channels := rows("ffn", "up_proj.weight"):
        bias = rows("ffn", "up_proj.bias") > 0
        layer["ffn"] = SwiGLU(hidden_size=hidden, intermediate_size=channels, bias=bias, norm_eps=norm_eps)
    return layer


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRope(Rope):
    """As a file has it: default frequencies, divided by stored factors [R/2], and a factor on cos and sin."""

    factors: list[float] | None
    scaling: float

    def frequencies(self, length: int = 1) -> tuple[Tensor, float]:
        inv_freq, _ = Rope.frequencies(self, length)
        return inv_freq if self.factors is None else inv_freq / torch.tensor(self.factors), self.scaling


def tokenize(export: Export, text: str) -> list[int]:
    """`text` as the export's Hugging Face tokenizer encodes it, without special tokens; [] without a tokenizer."""
    path = (export.path if export.path.is_dir() else export.path.parent) / "tokenizer.json"
    if not path.is_file():
        return []
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
