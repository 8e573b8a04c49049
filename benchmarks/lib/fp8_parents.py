"""A checkpoint's matrices stored in fp8 as others store them: for tests and benchmarks. One file of safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle.kernels.fp8 import FP8_MAX

FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = {**FLOAT, "strategy": "token", "dynamic": True}
STATIC = {**FLOAT, "strategy": "tensor", "dynamic": False}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = TOKEN, **more: Any) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": FLOAT | {"dynamic": False, "group_size": None, "actorder": None, "observer": "minmax"} | weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    } | more


def block_wise(block: tuple[int, int]) -> dict[str, Any]:
    """As DeepSeek and Qwen3-FP8 have it."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}


LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, int] | None, str]] = {
    # config, rows and columns of one scale (None: all of them), suffix
    "channel": (compressed({"strategy": "channel"}), (1, 10**9), "_scale"),
    "tensor": (compressed({"strategy": "tensor"}), None, "_scale"),
    "static activations": (compressed({"strategy": "tensor"}, STATIC), None, "_scale"),
    "weights alone": (compressed({"strategy": "channel"}, None), (1, 10**9), "_scale"),
    "blocks": (compressed({"strategy": "block", "block_structure": [24, 40]}), (24, 40), "_scale"),
    "128 x 128": (block_wise((128, 128)), (128, 128), "_scale_inv"),
    "odd blocks": (block_wise((24, 40)), (24, 40), "_scale_inv"),
}  # fmt: skip


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """One block after the other, as plainly as possible. [N, K] -> in fp8, scales [R, C], and what they are worth in float32."""
    rows, columns = weight.shape
    stored, worth = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(weight.shape)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[at].float().abs().max() / FP8_MAX
            stored[at] = (weight[at].float() / scales[i, j]).clamp(-FP8_MAX, FP8_MAX).to(stored.dtype)
            worth[at] = stored[at].float() * scales[i, j]
    return stored, scales, worth


def store_in_fp8(checkpoint: Path, layout: str) -> dict[str, Tensor]:
    """Rewrite a checkpoint in place. Returns all tensors as they should be read."""
    config, block, suffix = LAYOUTS[layout]
    path = checkpoint / "model.safetensors"
    stored: dict[str, Tensor] = {}
    worth: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        if not name.endswith("_proj.weight"):
            stored[name] = worth[name] = tensor.bfloat16()
            continue
        values, scales, worth[name] = quantise(tensor, block or tuple(tensor.shape))  # type: ignore[arg-type]
        stored |= {name: values, f"{name}{suffix}": scales.flatten() if block is None else scales}
        if layout == "static activations":
            stored[name.replace("weight", "input_scale")] = torch.tensor([0.25])
    save_file(stored, path, {"format": "pt"})
    known = json.loads((checkpoint / "config.json").read_text())
    known |= {"quantization_config": config, "dtype": "bfloat16"}
    (checkpoint / "config.json").write_text(json.dumps(known))
    return worth
