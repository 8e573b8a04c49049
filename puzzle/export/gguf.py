"""`--format gguf`: a child as one file that llama.cpp reads (architecture `deci`; of hybrids, see `gguf_hybrid`), tensor by tensor.

The per-layer arrays say what a layer is: (H, K) attention heads = softmax attention, (H, 0) = one matrix, (0, 0) = none;
feed_forward_length 0 = no FFN. llama.cpp computes some of these combinations wrongly or not at all, without an error:
`puzzle.export.lower` rewrites them first, and what is left is refused here, before anything is written.
Letters: E hidden_size, H num_attention_heads, K num_key_value_heads, D head_dim.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from torch import Tensor

from puzzle.base.errors import UserError, nearest, writing
from puzzle.base.files import check_writable, replacing
from puzzle.base.finite import all_finite
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.sub_block import SubBlock
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child, Tensors
from puzzle.export.engines import ENGINES
from puzzle.export.gguf_hybrid import TENSOR_NAMES as HYBRID_NAMES
from puzzle.export.gguf_hybrid import architecture, hybrid_blocks, hybrid_metadata, is_matrix, stored, stored_shape
from puzzle.export.gguf_tokenizer import tokenizer_metadata
from puzzle.export.refuse import is_nemotron_h, refuse

DTYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "q8_0": ("Q8_0", 7), "bf16": ("BF16", 32)}  # ggml type, file type
TENSOR_NAMES = {
    ("attention", "norm.weight"): "attn_norm.weight",
    ("attention", "linear.weight"): "attn_output.weight",
    ("ffn", "norm.weight"): "ffn_norm.weight",
    **{
        (kind, f"{name}_proj.{part}"): f"{ours}.{part}"
        for kind, names in (
            ("attention", {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}),
            ("ffn", {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}),
        )
        for name, ours in names.items()
        for part in ("weight", "bias")
    },
}
ALIGNMENT = 32  # bytes; every tensor starts at a multiple of it
BLOCK = 32  # values of a row that share one scale in q8_0
CHUNK = 2**22  # values converted together


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor: its name in the file, its shape as torch has it, the ggml type that it is stored in, and what reads it."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Tensor]


def export_gguf(child: Child, out: Path, *, dtype: str, force: bool) -> Path:
    """Write `child` (already lowered for llama.cpp) to the file `out`. Returns `out`.

    dtype: of the matrices: f32, f16, bf16 or q8_0; vectors are always float32, and in q8_0 files a matrix whose rows
    are no multiple of 32 is f16. A temporary file beside `out` is renamed at the end, so that `out` is never half
    written. Raises UserError for a shape or tokenizer that llama.cpp cannot take, and when `out` cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("`format` gguf needs the package gguf: pip install 'puzzle-nas[gguf]'") from None
    if dtype not in DTYPES:
        raise UserError(f"`dtype` {dtype} with `format` gguf: {nearest(dtype, DTYPES)}")
    _claim_file(out, force)
    entries: Callable[[], Iterator[_Entry]]
    if is_nemotron_h(child):
        name, own, num_blocks = architecture(child), hybrid_metadata(child), len(hybrid_blocks(child))
        entries = partial(_hybrid_entries, child, DTYPES[dtype][0])
    else:
        refuse_what_llama_cpp_gets_wrong(child)
        rope, factors = _rope(child)
        name, own, num_blocks = "deci", _deci_metadata(child) | rope, len(child.layers)
        entries = partial(_deci_entries, child, DTYPES[dtype][0], factors)
    metadata = _metadata(child, dtype, name, num_blocks) | own

    with replacing(out) as temporary:
        writer = gguf.GGUFWriter(temporary, name)
        for key, value in metadata.items():
            _add(writer, key, value)
        sizes = []
        for entry in entries():
            kind = gguf.GGMLQuantizationType[entry.type]
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            sizes.append(torch.Size(entry.shape).numel() // per_block * block_bytes)
            # float32 stands for any type here: with raw_dtype given, it only tells that the shape counts values.
            writer.add_tensor_info(entry.name, entry.shape, numpy.dtype(numpy.float32), sizes[-1], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(temporary, "ab") as handle:
            _pad(handle)
            for entry, size in zip(entries(), sizes, strict=True):
                tensor = entry.read()
                if entry.shape != tuple(tensor.shape):
                    raise ValueError(
                        f"tensor {entry.name} {tuple(tensor.shape)} came where {entry.shape} was announced"
                    )
                start = handle.tell()
                with writing(out):
                    _write(handle, tensor, entry)
                assert handle.tell() - start == size
                _pad(handle)
    return out


def permute(weight: Tensor, num_heads: int, *, inverse: bool = False) -> Tensor:
    """Rows of q_proj or k_proj [heads·D, ...] from rotate-half order (i, i + D/2) to the adjacent pairs that llama.cpp
    rotates in this architecture; biases alike. inverse: back again."""
    half = weight.shape[0] // num_heads // 2
    split = (num_heads, half, 2) if inverse else (num_heads, 2, half)
    return weight.reshape(*split, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def refuse_what_llama_cpp_gets_wrong(child: Child) -> None:
    """Raise UserError, naming layer and sub-block, for what architecture `deci` cannot say or computes wrongly."""
    refuse(child, ENGINES["llama.cpp"], "gguf")
    last = len(child.layers) - 1
    for index, layer in enumerate(child.layers):
        where = f"layer {layer.origin} of {child.name}"
        attention, ffn = layer.attention, layer.ffn
        if isinstance(ffn, Linear):
            raise UserError(f"{where}: llama.cpp has no linear FFN; lower it for llama.cpp, or choose another FFN")
        if isinstance(ffn, NoOp) and (not isinstance(attention, NoOp) or index == last):
            raise UserError(
                f"{where}: without an FFN llama.cpp loses this layer's attention or does not load the file; lower it "
                "for llama.cpp (a zero FFN of width 256), or choose another FFN"
            )
        if index == 0 and isinstance(attention, NoOp):
            raise UserError(
                f"{where}: llama.cpp does not load a file whose first layer has no attention; lower it for llama.cpp "
                "(a zero linear attention), or choose another attention"
            )


def _rope(child: Child) -> tuple[dict[str, Any], Tensor | None]:
    """The keys, and the factors [D/2] of what the base alone does not say."""
    rope, head_dim = child.around.ropes["default"], child.attention.head_dim
    inv_freq, attention_factor = rope.frequencies()
    theta = float(rope.parameters["rope_theta"])
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    keys = {"deci.rope.freq_base": theta}
    if attention_factor != 1:
        keys["deci.rope.scaling.attn_factor"] = attention_factor
    return keys, None if torch.equal(plain, inv_freq) else plain / inv_freq


def _metadata(child: Child, dtype: str, name: str, num_blocks: int) -> dict[str, Any]:
    """What every architecture has."""
    base = "general.base_model.0.name"
    special = {"bos": child.bos_token_id, "eos": child.eos_token_id, "pad": child.pad_token_id}
    return {
        "general.name": child.name,
        "general.type": "model",
        "general.file_type": DTYPES[dtype][1],
        "general.quantization_version": 2,
        **({"general.license": child.licence} if child.licence else {}),
        **({"general.base_model.count": 1, base: child.parent_name} if child.parent_name else {}),
        f"{name}.vocab_size": child.vocab_size,
        f"{name}.context_length": child.max_length,
        f"{name}.embedding_length": child.hidden_size,
        f"{name}.block_count": num_blocks,
        **tokenizer_metadata(child.tokenizer, child.vocab_size, special),
    }


def _deci_metadata(child: Child) -> dict[str, Any]:
    attends = child.attention
    heads = [0 if isinstance(layer.attention, NoOp) else attends.num_attention_heads for layer in child.layers]
    kv_heads = [x.attention.num_key_value_heads if isinstance(x.attention, Gqa) else 0 for x in child.layers]
    return {
        "deci.attention.head_count": heads,
        "deci.attention.head_count_kv": kv_heads,
        "deci.attention.key_length": attends.head_dim,
        "deci.attention.value_length": attends.head_dim,
        "deci.attention.layer_norm_rms_epsilon": child.around.norm_eps,
        "deci.rope.dimension_count": attends.head_dim,
        "deci.feed_forward_length": [x.ffn.intermediate_size if isinstance(x.ffn, SwiGLU) else 0 for x in child.layers],
    }


def _add(writer: Any, key: str, value: Any) -> None:
    """One metadata value by its Python type; integers are unsigned, token types (a list of small ints) signed."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value:
        writer.add_array(key, value)


def _entry(name: str, shape: tuple[int, ...], kind: str, read: Callable[[], Tensor]) -> _Entry:
    """`kind` is the type that is wanted, and F16 where q8_0 has no block for its rows."""
    return _Entry(name, shape, "F16" if kind == "Q8_0" and shape[-1] % BLOCK else kind, read)


def _around(child: Child, kind: str, inside: Iterable[_Entry]) -> Iterator[_Entry]:
    whole = (child.vocab_size, child.hidden_size)
    yield _entry("token_embd.weight", whole, kind, child.read_embedding)
    yield from inside
    yield _entry("output_norm.weight", (child.hidden_size,), "F32", child.read_final_norm)
    if not child.tied:
        yield _entry("output.weight", whole, kind, child.read_head)


def _deci_entries(child: Child, kind: str, factors: Tensor | None) -> Iterator[_Entry]:
    """Every tensor of the file in order, from shapes alone. A sub-block is read whole by the first of its tensors that is."""

    def of_block(block: Callable[[], Tensors], name: str) -> Tensor:
        tensor = block().pop(name)
        turned = name.startswith(("q_proj.", "k_proj."))
        return permute(tensor, tensor.shape[0] // child.attention.head_dim) if turned else tensor

    def inside() -> Iterator[_Entry]:
        if factors is not None:
            yield _entry("rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors)
        for index, layer in enumerate(child.layers):
            for slot, sub_block in layer.slots.items():
                block = cache(layer.reads[slot])
                for name, shape in sub_block.tensors().items():
                    read = partial(of_block, block, name)
                    own = kind if len(shape) == 2 else "F32"
                    yield _entry(f"blk.{index}.{TENSOR_NAMES[slot, name]}", shape, own, read)

    return _around(child, kind, inside())


def _hybrid_entries(child: Child, kind: str) -> Iterator[_Entry]:
    """The same of blocks of one mixer."""

    def of_block(block: Callable[[], Tensors], sub_block: SubBlock, name: str) -> Tensor:
        return stored(sub_block, name, block().pop(name))

    def inside() -> Iterator[_Entry]:
        for index, one in enumerate(hybrid_blocks(child)):
            sub_block, block = one.sub_block, cache(one.layer.reads[one.slot])
            for name, shape in sub_block.tensors().items():
                theirs = f"blk.{index}.{HYBRID_NAMES[sub_block.kind][name]}"
                read = partial(of_block, block, sub_block, name)
                own = kind if is_matrix(name) else "F32"
                yield _entry(theirs, stored_shape(sub_block, name, shape), own, read)

    return _around(child, kind, inside())


def _write(handle: IO[bytes], tensor: Tensor, entry: _Entry) -> None:
    """Append one tensor in its stored type, a few million values at a time. Raises UserError when float16 overflows."""
    from gguf.quants import GGMLQuantizationType, quantize

    rows = tensor.detach().cpu().reshape(-1, tensor.shape[-1])
    for part in rows.split(max(1, CHUNK // rows.shape[1])):
        if entry.type == "Q8_0":
            data = quantize(part.float().numpy(), GGMLQuantizationType.Q8_0)
        elif entry.type == "BF16":
            data = part.bfloat16().view(torch.int16).numpy()
        elif entry.type == "F16":
            half = part.half()
            if not all_finite(half):
                raise UserError(f"{entry.name} has values beyond 65504, the largest float16: use `dtype` bf16 or f32")
            data = half.numpy()
        else:
            data = part.float().numpy()
        handle.write(numpy.ascontiguousarray(data).tobytes())


def _pad(handle: IO[bytes]) -> None:
    handle.write(b"\0" * (-handle.tell() % ALIGNMENT))


def _claim_file(out: Path, force: bool) -> None:
    """Check that `out` is a .gguf file name that may be written. Raises UserError."""
    if out.suffix != ".gguf":
        raise UserError(f"`out` {out}: `format` gguf writes one file; give a name that ends in .gguf")
    if out.is_dir():
        raise UserError(f"`out` {out} is a directory: give a file name that ends in .gguf")
    if out.exists() and not force:
        raise UserError(f"`out` {out} exists: choose another name, or pass `force` to replace it")
    check_writable(out.parent)
