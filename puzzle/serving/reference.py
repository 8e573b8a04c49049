"""What an exported file should compute: any of our export formats, read back into the plain forward of puzzle/runtime/model.py.

The shape of every sub-block is taken from the tensors that are there, not from the configuration that engines read: a
configuration that says something else shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable
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
from puzzle.parents.checkpoint import Checkpoint
from puzzle.parents.names import EMBEDDING, FINAL_NORM, HEAD, hf_name
from puzzle.parents.nemotron_nas import rope_of
from puzzle.parents.opened import open_model
from puzzle.parents.rope import Rope
from puzzle.parents.structure import Structure
from puzzle.runtime.model import Block, CausalModel, load_model

FORMATS = {"puzzle": "hf", "nemotron-nas": "nemotron-nas"}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What tensors do not tell."""

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    norm_eps: float
    max_length: int
    num_layers: int
    rope: Rope


def _load_nemotron_nas(path: Path) -> CausalModel:
    checkpoint = Checkpoint(path)
    config = checkpoint.config
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim, length = int(config.get("head_dim") or hidden // heads), int(config["max_position_embeddings"])
    sizes = Sizes(
        hidden_size=hidden,
        num_attention_heads=heads,
        head_dim=head_dim,
        norm_eps=float(config["rms_norm_eps"]),
        max_length=length,
        num_layers=int(config["num_hidden_layers"]),
        rope=Rope(head_dim=head_dim, max_length=length, parameters=rope_of(config)),
    )
    # mlx-lm has its own name for the matrix of a linear FFN.
    names = {name.replace(".mlp.linear.", ".mlp.linear_mlp."): name for name in checkpoint.names}
    kinds = config.get("layer_types") or []
    windows = {i: int(config["sliding_window"]) for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    return _model(sizes, set(names), lambda name: checkpoint.tensor(names[name]), windows)


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
    length = int(values["deci.context_length"])
    sizes = Sizes(
        hidden_size=int(values["deci.embedding_length"]),
        num_attention_heads=max(values["deci.attention.head_count"]),
        head_dim=dim,
        norm_eps=float(values["deci.attention.layer_norm_rms_epsilon"]),
        max_length=length,
        num_layers=int(values["deci.block_count"]),
        rope=StoredRope(
            head_dim=dim,
            max_length=length,
            parameters={"rope_theta": theta},
            factors=tensors["rope_freqs.weight"].data.tolist() if "rope_freqs.weight" in tensors else None,
            scaling=float(values.get("deci.rope.scaling.attn_factor", 1.0)),
        ),
    )
    names = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
    for index, (heads, kv_heads) in enumerate(
        zip(values["deci.attention.head_count"], values["deci.attention.head_count_kv"], strict=True)
    ):
        for (slot, name), gguf_name in TENSOR_NAMES.items():
            if name == "linear.weight" and not (slot == "attention" and heads and not kv_heads):
                continue
            if name == "o_proj.weight" and heads and not kv_heads:
                continue
            names[f"blk.{index}.{gguf_name}"] = _name(index, slot, name)
    found = {names[name]: tensor for name, tensor in tensors.items() if name in names}

    def tensor(name: str) -> Tensor:
        stored = found[name]
        value = torch.from_numpy(dequantize(stored.data, stored.tensor_type).astype("float32"))
        if ".q_proj." in name or ".k_proj." in name:
            value = permute(value, value.shape[0] // dim, inverse=True)
        return value

    return _model(sizes, set(found), tensor)


def _model(
    sizes: Sizes, names: set[str], tensor: Callable[[str], Tensor], windows: dict[int, int] | None = None
) -> CausalModel:
    """A model from Hugging Face names, a way to get each tensor, and the layers whose attention has a window."""
    layers, blocks = [], []
    for index in range(sizes.num_layers):
        layer: dict[str, SubBlock] = {
            "attention": _attention(sizes, index, names, tensor, (windows or {}).get(index)),
            "ffn": _ffn(sizes, index, names, tensor),
        }
        layers.append(layer)
        parts = {}
        for slot, sub_block in layer.items():
            weights = {n: tensor(hf_name(index, slot, sub_block, n)).float() for n in sub_block.tensors()}
            parts[slot] = loaded(sub_block, weights)
        blocks.append(Block(parts))
    head = tensor(HEAD).float() if HEAD in names else None
    embedding, norm = tensor(EMBEDDING).float(), tensor(FINAL_NORM).float()
    structure = Structure(
        hidden_size=sizes.hidden_size,
        vocab_size=len(embedding),
        max_length=sizes.max_length,
        tied=head is None,
        norm_eps=sizes.norm_eps,
        ropes={"default": sizes.rope},
        layers=tuple(layers),
    )
    return CausalModel(structure, embedding, blocks, norm, head).requires_grad_(False).eval()


def _name(index: int, slot: str, name: str) -> str:
    """The Hugging Face name of a tensor of a sub-block with a norm before it, whatever its kind."""
    return hf_name(index, slot, NO_OP, name)


def _attention(
    sizes: Sizes, index: int, names: set[str], tensor: Callable[[str], Tensor], window: int | None
) -> SubBlock:
    """What the layer's tensors say."""
    if _name(index, "attention", "linear.weight") in names:
        return Linear(hidden_size=sizes.hidden_size, norm_eps=sizes.norm_eps)
    if (keys := _name(index, "attention", "k_proj.weight")) not in names:
        return NO_OP
    return Gqa(
        hidden_size=sizes.hidden_size,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=tensor(keys).shape[0] // sizes.head_dim,
        head_dim=sizes.head_dim,
        window=window,
        qkv_bias=_name(index, "attention", "q_proj.bias") in names,
        o_bias=_name(index, "attention", "o_proj.bias") in names,
        norm_eps=sizes.norm_eps,
    )


def _ffn(sizes: Sizes, index: int, names: set[str], tensor: Callable[[str], Tensor]) -> SubBlock:
    if _name(index, "ffn", "linear.weight") in names:
        return Linear(hidden_size=sizes.hidden_size, norm_eps=sizes.norm_eps)
    if (up := _name(index, "ffn", "up_proj.weight")) not in names:
        return NO_OP
    return SwiGLU(
        hidden_size=sizes.hidden_size,
        intermediate_size=tensor(up).shape[0],
        bias=_name(index, "ffn", "up_proj.bias") in names,
        norm_eps=sizes.norm_eps,
    )


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
    if export.tokenizer is None:
        return []
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(export.tokenizer / "tokenizer.json")).encode(text, add_special_tokens=False).ids
