"""`--format nemotron-nas`: a child as a DeciLM checkpoint, which stock engines read with their own model code.

Readers: vLLM, SGLang, mlx-lm, TensorRT-LLM and llama.cpp's converter natively (model code of theirs, our configuration
class), transformers through the shipped modeling_decilm.py. `lower` has made the child fit its reader before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import Child, ChildLayer
from puzzle.export.refuse import refuse_unlike_llama
from puzzle.parents.nemotron_nas import WIDTH_STEP

_LINEAR_MLP = "mlp.linear_mlp.weight"


def decilm_config(child: Child, engine: str | None) -> dict[str, Any]:
    """config.json. Raises UserError for what the format has no words for."""
    refuse_unlike_llama(child, "a reader of nemotron-nas")
    attends, around = child.attention, child.around
    rope = dict(around.ropes["default"].parameters)
    theta = rope.pop("rope_theta")
    config: dict[str, Any] = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "vocab_size": child.vocab_size,
        "hidden_size": child.hidden_size,
        "intermediate_size": None,
        "num_hidden_layers": len(child.layers),
        "num_attention_heads": attends.num_attention_heads,
        "num_key_value_heads": None,
        "head_dim": attends.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": around.norm_eps,
        "max_position_embeddings": child.max_length,
        "rope_theta": theta,
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "attention_bias": attends.o_bias,
        "mlp_bias": child.ffn.bias,
        "tie_word_embeddings": child.tied,
        "bos_token_id": child.bos_token_id,
        "eos_token_id": child.eos_token_id,
        "pad_token_id": child.pad_token_id,
        "initializer_range": child.kept.get("initializer_range", 0.02),
        "use_cache": True,
        "dtype": child.dtype_name,
        "torch_dtype": child.dtype_name,  # transformers 4's name, which TensorRT-LLM reads
        "parent_name": child.parent_name,
        "block_configs": [_block_config(child, layer, exact_widths=engine == "vllm") for layer in child.layers],
    }
    if attends.qkv_bias != attends.o_bias:
        config["qkv_bias"] = attends.qkv_bias
    windows = [child.reach(layer.attention) if isinstance(layer.attention, Gqa) else None for layer in child.layers]
    if any(windows):
        (config["sliding_window"],) = set(windows) - {None}
        config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    if engine == "mlx" and any(isinstance(layer.ffn, Linear) for layer in child.layers):
        config["linear_mlp"] = "linear"  # how its reader calls the matrix; modeling_decilm.py follows
    original = "original_max_position_embeddings"
    if engine == "llama.cpp" and original in rope:  # its converter looks here
        config[original] = rope[original]
    return config


def _block_config(child: Child, layer: ChildLayer, exact_widths: bool) -> dict[str, Any]:
    """One entry of `block_configs`: exactly the keys that mlx-lm and TensorRT-LLM know, unless a width needs its own."""
    heads = child.attention.num_attention_heads
    attention, ffn = layer.attention, layer.ffn
    if any(isinstance(own, Linear) and own.rank is not None for own in (attention, ffn)):
        raise ValueError(f"layer {layer.origin}: two matrices of low rank were not multiplied to one")
    ffn_entry: dict[str, Any] = {
        "ffn_mult": None,
        "no_op": isinstance(ffn, NoOp),
        "replace_with_linear": isinstance(ffn, Linear),
        "sparsify": None,
    }
    if isinstance(ffn, SwiGLU):
        if ffn.intermediate_size % WIDTH_STEP == 0:
            ffn_entry["ffn_mult"] = ffn_mult(ffn.intermediate_size, child.hidden_size)
        elif exact_widths:
            del ffn_entry["ffn_mult"]
            ffn_entry["intermediate_size"] = ffn.intermediate_size
        else:
            raise ValueError(
                f"layer {layer.origin}: FFN width {ffn.intermediate_size} was not padded to a multiple of {WIDTH_STEP}"
            )
    return {
        "attention": {
            "n_heads_in_group": heads // attention.num_key_value_heads if isinstance(attention, Gqa) else None,
            "no_op": isinstance(attention, NoOp),
            "replace_with_linear": isinstance(attention, Linear),
            "sparsify": None,
            "window_length": None,
            "num_sink_tokens": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
        },
        "ffn": ffn_entry,
    }


def ffn_mult(width: int, hidden_size: int) -> float:
    """What readers turn back into `width`, a multiple of 256: int(2·ffn_mult·E/3), rounded up to a multiple of 256.

    The product may come out a hair below `width`, which rounding up mends, but must not come out above it.
    """
    value = 3.0 * width / (2.0 * hidden_size)
    assert -(-int(2 * value * hidden_size / 3) // WIDTH_STEP) * WIDTH_STEP == width
    return value


def decilm_tensors(child: Child, engine: str | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as the readers call them: Llama's names, and mlx-lm's own for linear FFNs."""
    for name, tensor in child.tensors():
        if engine == "mlx" and name.endswith(_LINEAR_MLP):
            stem = name.removesuffix("linear_mlp.weight") + "linear"
            yield f"{stem}.weight", tensor
            if child.ffn.bias:
                yield f"{stem}.bias", tensor.new_zeros(child.hidden_size)
        else:
            yield name, tensor
