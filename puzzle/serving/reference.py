"""What an exported file should compute: any of our export formats, read back into the plain forward of puzzle/model.py.

The shape of every sub-block is taken from the tensors that are there, not from the configuration that engines read: a
configuration that says something else shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.blocklib.layer import KINDS, Kind, LayerSpec
from puzzle.parents.checkpoint import Checkpoint
from puzzle.parents.family import _rope, hf_name, open_model
from puzzle.runtime.model import OWNERS, CausalModel, block_from_hf, load_model

FORMATS = {"puzzle": "hf", "nemotron-nas": "nemotron-nas"}
SIZES: dict[Kind, tuple[str, str]] = {  # the matrix whose rows tell a sub-block's size, and the size's name
    "attention": ("k_proj.weight", "num_key_value_heads"),
    "ffn": ("up_proj.weight", "intermediate_size"),
}


@dataclass(frozen=True, kw_only=True)
class Export:
    """path: the directory or .gguf file; format: hf, nemotron-nas, gguf, or parent (a supported checkpoint that we did not
    write); dtype: what an engine computes in: float32, or for .gguf files the type of their matrices."""

    path: Path
    format: str
    dtype: str
    vocab_size: int
    max_length: int

    @property
    def tokenizer(self) -> Path | None:
        """The directory of a Hugging Face tokenizer, where the export carries one."""
        directory = self.path if self.path.is_dir() else self.path.parent
        return directory if (directory / "tokenizer.json").is_file() else None


def find_export(path: Path) -> Export:
    """Recognise what `puzzle export` wrote. Raises UserError when it is none of its formats."""
    if path.is_file() or sorted(path.glob("*.gguf")):
        return _find_gguf(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give the directory or the .gguf file that `puzzle export` wrote")
    config = Checkpoint(path).config
    if config.get("model_type") != "nemotron-nas":
        open_model(path)  # raises for what is neither a child nor a supported parent
    return Export(
        path=path,
        format=FORMATS.get(config["model_type"], "parent"),
        dtype="float32",
        vocab_size=int(config["vocab_size"]),
        max_length=int(config.get("max_position_embeddings", 2048)),
    )


def load_reference(export: Export) -> CausalModel:
    """The whole export in float32 on the CPU."""
    loaders = {"gguf": _load_gguf, "nemotron-nas": _load_nemotron_nas}
    return loaders.get(export.format, load_model)(export.path)


def _load_nemotron_nas(path: Path) -> CausalModel:
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    inv_freq, scaling = _rope(path)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    spec = LayerSpec(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=int(config.get("head_dim") or hidden // heads),
        intermediate_size=1,
        rms_norm_eps=float(config["rms_norm_eps"]),
        inv_freq=inv_freq,
        rope_scaling=scaling,
    )
    # mlx-lm has its own name for the matrix of a linear FFN.
    names = {name.replace(".mlp.linear.", ".mlp.linear_mlp."): name for name in checkpoint.names}
    kinds = config.get("layer_types") or []
    windows = {i: int(config["sliding_window"]) for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    return _model(
        spec, int(config["num_hidden_layers"]), set(names), lambda name: checkpoint.tensor(names[name]), windows
    )


def _find_gguf(path: Path) -> Export:
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(
                f"{path} holds {len(files)} .gguf files ({', '.join(f.name for f in files)}): give one of them"
            )
        path = files[0]
    values, tensors = read_gguf(path)
    return Export(
        path=path,
        format="gguf",
        dtype={"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0"}.get(
            tensors["token_embd.weight"].tensor_type.name, "?"
        ),
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        max_length=int(values["deci.context_length"]),
    )


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors (memory-mapped) of a GGUF file of architecture `deci`. Raises UserError otherwise."""
    try:
        import gguf
    except ImportError:
        raise UserError("reading .gguf files needs the package gguf: pip install 'puzzle-nas[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): export it again") from error
    values = {name: field.contents() for name, field in reader.fields.items()}
    if values.get("general.architecture") != "deci":
        raise UserError(
            f"{path} has architecture '{values.get('general.architecture')}': serve-check reads 'deci' files"
        )
    return values, {tensor.name: tensor for tensor in reader.tensors}


def _load_gguf(path: Path) -> CausalModel:
    from gguf.quants import dequantize

    from puzzle.export.gguf import TENSOR_NAMES, permute

    values, tensors = read_gguf(path)
    dim, theta = int(values["deci.attention.key_length"]), float(values["deci.rope.freq_base"])
    num_layers = int(values["deci.block_count"])
    inv_freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if "rope_freqs.weight" in tensors:
        inv_freq = inv_freq / torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    spec = LayerSpec(
        hidden_size=int(values["deci.embedding_length"]),
        num_attention_heads=max(values["deci.attention.head_count"]),
        num_key_value_heads=1,
        head_dim=dim,
        intermediate_size=1,
        rms_norm_eps=float(values["deci.attention.layer_norm_rms_epsilon"]),
        inv_freq=tuple(inv_freq.tolist()),
        rope_scaling=float(values.get("deci.rope.scaling.attn_factor", 1.0)),
    )
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names["output.weight"] = "lm_head.weight"
    for index, (heads, kv_heads) in enumerate(
        zip(values["deci.attention.head_count"], values["deci.attention.head_count_kv"], strict=True)
    ):
        for (kind, name), gguf_name in TENSOR_NAMES.items():
            if name == "linear.weight" and not (kind == "attention" and heads and not kv_heads):
                continue
            if name == "o_proj.weight" and heads and not kv_heads:
                continue
            names[f"blk.{index}.{gguf_name}"] = hf_name(index, kind, name)
    found = {names[name]: tensor for name, tensor in tensors.items() if name in names}

    def tensor(name: str) -> Tensor:
        stored = found[name]
        value = torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype("float32"))
        if ".q_proj." in name or ".k_proj." in name:
            value = permute(value, value.shape[0] // dim, inverse=True)
        return value

    return _model(spec, num_layers, set(found), tensor)


def _model(
    spec: LayerSpec,
    num_layers: int,
    names: set[str],
    tensor: Callable[[str], Tensor],
    windows: dict[int, int] | None = None,
) -> CausalModel:
    """A model from Hugging Face names, a way to get each tensor, and the layers whose attention has a window."""
    blocks = []
    for index in range(num_layers):
        entry, own = _layer(spec, index, names, tensor, (windows or {}).get(index))
        blocks.append(block_from_hf(index, entry, own, lambda name: tensor(name).float()))
    head = tensor("lm_head.weight").float() if "lm_head.weight" in names else None
    embedding, norm = tensor("model.embed_tokens.weight").float(), tensor("model.norm.weight").float()
    return CausalModel(spec, embedding, blocks, norm, head).requires_grad_(False).eval()


def _layer(
    spec: LayerSpec, index: int, names: set[str], tensor: Callable[[str], Tensor], window: int | None
) -> tuple[dict[str, Any], LayerSpec]:
    """(`per_layer_config` entry, spec with the layer's biases) of the shape that its tensors have."""

    def has(kind: Kind, name: str) -> bool:
        return hf_name(index, kind, name) in names

    entry: dict[str, Any] = {"sliding_window": window, "linear": [], "skip": []}
    for kind in KINDS:
        matrix, size = SIZES[kind]
        if has(kind, "linear.weight"):
            entry["linear"].append(OWNERS[kind])
        elif has(kind, matrix):
            rows = tensor(hf_name(index, kind, matrix)).shape[0]
            entry[size] = rows // spec.head_dim if kind == "attention" else rows
        else:
            entry["skip"].append(OWNERS[kind])
    biased = replace(
        spec,
        qkv_bias=has("attention", "q_proj.bias"),
        o_bias=has("attention", "o_proj.bias"),
        mlp_bias=has("ffn", "up_proj.bias"),
    )
    return entry, biased


def tokenize(export: Export, text: str) -> list[int]:
    """`text` as the export's Hugging Face tokenizer encodes it, without special tokens; [] without a tokenizer."""
    if export.tokenizer is None:
        return []
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(export.tokenizer / "tokenizer.json")).encode(text, add_special_tokens=False).ids
