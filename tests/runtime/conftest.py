"""Random models as transformers makes them and as ours; the tiny parent with other sub-blocks in every layer."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from puzzle.blocklib.variant import variant_of
from puzzle.parents.opened import open_model
from puzzle.runtime.model import Block, CausalModel, load_model, random_part

SHAPES = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMA = (LlamaConfig, LlamaForCausalLM)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
MODELS = {  # the families that differ in the runtime's eyes; all of them: benchmarks/lib/tiny_parents.py
    "llama": (*LLAMA, {}),
    "llama tied": (*LLAMA, {"tie_word_embeddings": True}),
    "llama biased": (*LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": (*LLAMA, LLAMA3),
    "yarn rope": (*LLAMA, rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 20}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
MIXED = {
    0: {"attention": "kv1"},
    1: {"attention": "none", "ffn": "linear-8"},
    2: {"attention": "window-24"},
    3: {"ffn": "linear"},
}


def replaced(model: CausalModel, layer: int, names: Mapping[str, str]) -> None:
    """Put variants with random weights into one layer of `model`, in place. names: by slot."""
    parts = model.blocks[layer].parts()
    for slot, name in names.items():
        variant = variant_of(parts[slot].sub_block, name, slot)
        like = model.embedding.weight
        parts[slot] = random_part(variant.sub_block, like.device, like.dtype)
    model.blocks[layer] = Block(parts)
    chosen = [{slot: part.sub_block for slot, part in block.parts().items()} for block in model.blocks]
    model.structure = model.structure.with_layers(chosen)


@pytest.fixture(scope="session")
def replace_parts():
    return replaced


@pytest.fixture(scope="module")
def mixed(parent) -> CausalModel:
    torch.manual_seed(0)
    model = load_model(str(parent), dtype=torch.float32)
    for layer, names in MIXED.items():
        replaced(model, layer, names)
    return model


@pytest.fixture(params=MODELS, scope="module")
def pair(request, tmp_path_factory):
    """(transformers' model, ours) of one family, from the same directory."""
    config_class, model_class, changes = MODELS[request.param]
    torch.manual_seed(0)
    theirs = model_class(config_class(**SHAPES | changes)).eval()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1:  # transformers starts them at zero or one, which would hide a missing or a swapped one
            parameter.data += (0.3 if name.endswith("bias") else 0.2) * torch.randn_like(parameter)
    directory = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(directory)
    open_model(directory).check()
    return theirs, load_model(directory)
