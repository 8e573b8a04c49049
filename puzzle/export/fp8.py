"""`--dtype fp8` and `--kv-dtype fp8`: a checkpoint in the compressed-tensors layout, which stock vLLM and SGLang read.

    weights      every matrix of a layer in float8_e4m3fn, NAME_scale [N, 1] in float32 per output channel
    activations  quantised by the engine as they come, per token
    cache        self_attn.k_scale and v_scale [1] per layer in float32, where `kv_dtype` is fp8
    the rest     embedding, LM head, norms and biases in bf16

Engines run q, k and v as one matrix, and gate and up: the matrices of a sub-block are all in fp8, each row with its own scale, or all
in bf16 and named in the section's "ignore". The layout: vllm/model_executor/layers/quantization/compressed_tensors and compressed_tensors 0.15 to 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from puzzle.base.errors import UserError
from puzzle.base.finite import all_finite
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.plain.gqa import Attention
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.data.packing import load_tokens
from puzzle.export.child import Child
from puzzle.export.walker import Walker
from puzzle.kernels.fp8 import FP8_MAX, ROWS, to_fp8
from puzzle.parents.names import MODULES, hf_name

SEQUENCES, SEQ_LEN = 64, 512  # that the cache's scales are calibrated on

Scales = dict[int, tuple[float, float]]  # of k and v, by the layer of the child before any lowering


def kept_in_bf16(child: Child) -> list[str]:
    """The names of all matrices of sub-blocks that stay in bf16."""
    found = []
    for index, layer in enumerate(child.layers):
        for slot in layer.in_bf16:
            shapes = layer.slots[slot].tensors()
            found += [
                hf_name(index, slot, layer.slots[slot], name) for name, shape in shapes.items() if len(shape) == 2
            ]
    return found


def quantization_config(weights: bool, cache: bool, kept: Iterable[str] = ()) -> dict[str, Any]:
    """config.json's section. weights, cache: whether they are in fp8. kept: names of matrices in layers that are not."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**fp8, "strategy": "channel", "dynamic": False},
        "input_activations": {**fp8, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if weights else "dense",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group} if weights else {},
        "ignore": ["lm_head", *(name.removesuffix(".weight") for name in kept)],
        "kv_cache_scheme": {**fp8, "strategy": "tensor", "dynamic": False} if cache else None,
    }


def check_kinds(child: Child) -> None:
    """Raise UserError for a sub-block whose matrices engines may not quantise."""
    for layer in child.layers:
        for slot, sub_block in layer.slots.items():
            if not isinstance(sub_block, Gqa | SwiGLU | Linear | NoOp):
                raise UserError(
                    f"layer {layer.origin} {slot}: sub-blocks of kind '{sub_block.kind}' have no form in fp8: use `dtype` bfloat16"
                )


def in_fp8(tensors: Iterable[tuple[str, Tensor]], kept: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a child with every matrix of a layer, in whatever dtype it comes, as fp8 and its scales, the rest in bf16,
    as are those named in `kept`.

    Raises UserError for NaN and infinity.
    """
    whole = set(kept)
    for name, tensor in tensors:
        if name in whole or tensor.ndim != 2 or not name.startswith("model.layers."):
            yield name, tensor.bfloat16()
            continue
        found = [_finite(name, rows) for rows in tensor.split(ROWS)]
        yield name, torch.cat([values for values, _ in found])
        yield f"{name}_scale", torch.cat([scale for _, scale in found])[:, None]


def _finite(name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    if not all_finite(rows):
        raise UserError(f"`dtype` fp8: weight {name} has NaN or infinite values: build its block again")
    return to_fp8(rows)


def cache_tensors(child: Child, scales: Scales) -> Iterator[tuple[str, Tensor]]:
    """The scales of every attention's cache. One that a lowering put there keeps zeros: its scales are 1."""
    for index, layer in enumerate(child.layers):
        if isinstance(layer.attention, Gqa):
            for letter, scale in zip("kv", scales.get(layer.origin, (1.0, 1.0)), strict=True):
                yield f"model.layers.{index}.{MODULES['attention']}.{letter}_scale", torch.tensor([scale])


def calibrate(child: Child, data: list[str], text_field: str, device: torch.device, dtype: torch.dtype) -> Scales:
    """The largest magnitude of every layer's cached keys and values on training text, as a share of what fp8 holds.

    Raises UserError without a tokenizer, without text, and where the child gives NaN or infinity.
    """
    if child.tokenizer is None:
        raise UserError(f"`kv_dtype` fp8: {child.name} has no tokenizer, and its cache's scales come from text")
    tokens = load_tokens(
        data,
        child.tokenizer,
        seq_len=min(SEQ_LEN, child.max_length),
        num_train=SEQUENCES,
        num_validation=1,
        text_field=text_field,
    )
    return cache_scales(Walker(child, tokens.train, device, dtype))


@torch.no_grad()
def cache_scales(walker: Walker) -> Scales:
    """Largest magnitude / 448 of keys, as they are cached (normed and rotated), and of values; 1 where all are zero."""
    stream, found = walker.embedded(), {}
    for index, block in walker.blocks():
        largest = torch.zeros(2)
        for batch, x in enumerate(walker.room.fetched((stream, n) for n in range(len(walker.ids)))):
            for part in block.parts().values():
                if isinstance(part, Attention):
                    _, k, v = part.project(part.enter(x), walker.ropes)
                    largest = torch.maximum(largest, torch.stack([k.abs().max(), v.abs().max()]).float().cpu())
                x = part.add(x, walker.ropes)
            walker.room.put(stream, batch, x)
        if not all_finite(largest):
            raise UserError(f"`kv_dtype` fp8: layer {index} of {walker.child.name} gives NaN or infinity on this text")
        if isinstance(walker.child.layers[index].attention, Gqa):
            k, v = (value / FP8_MAX or 1.0 for value in largest.tolist())
            found[walker.child.layers[index].origin] = (k, v)
    return found
