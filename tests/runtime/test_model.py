"""Our model against transformers', our runtime against our model, in float32 at odd sizes."""

from __future__ import annotations

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

from puzzle.base.errors import UserError
from puzzle.base.workload import Workload
from puzzle.blocklib.layer import KINDS
from puzzle.blocklib.modules import NoOp
from puzzle.blocklib.runtime import KVCache
from puzzle.blocklib.variant import parse_variant
from puzzle.measure.plain import measure
from puzzle.parents.family import open_model
from puzzle.runtime.model import Block, load_model
from puzzle.runtime.plain import Runner

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
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama biased": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "yarn rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 20}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}


@pytest.fixture(params=MODELS, scope="module")
def pair(request, tmp_path_factory):
    """(transformers' model, ours) of one family, from the same directory."""
    config_class, model_class, changes = MODELS[request.param]
    torch.manual_seed(0)
    theirs = model_class(config_class(**SHAPES | changes)).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):  # transformers starts biases at zero, which would hide a missing one
            torch.nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(directory)
    open_model(directory).check()
    return theirs, load_model(directory)


@torch.no_grad()
def test_logits_equal_transformers(pair):
    theirs, ours = pair
    ids = torch.randint(0, 97, (2, 63))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_runtime_generates_what_the_whole_model_does(pair):
    """Prefill and decode over the static cache = a full forward for every token."""
    _, ours = pair
    prompt = torch.randint(1, 97, (3, 17))
    expected = prompt
    for _ in range(24):
        expected = torch.cat((expected, ours(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(Runner(ours, 3, 64).generate(prompt, 24), expected[:, 17:])


@torch.no_grad()
@pytest.mark.parametrize("drawn", range(6))
def test_runtime_on_heterogeneous_children(parent, drawn):
    """Random mixes of variants, with none left in some layers; windows shorter than the prompt."""
    model = load_model(parent)
    generator = torch.Generator().manual_seed(drawn)
    names = {
        "attention": ["parent", "kv1", "linear", "none", "window-5", "window-40"],
        "ffn": ["parent", "0.5", "linear", "none"],
    }
    for index in range(len(model.blocks)):
        parts = {}
        for kind in KINDS:
            name = names[kind][torch.randint(len(names[kind]), (1,), generator=generator).item()]
            parts[kind] = parse_variant(kind, name, model.spec).empty(model.spec).requires_grad_(False)
        model.blocks[index] = Block(parts["attention"], parts["ffn"])
    prompt = torch.randint(2, 384, (2, 19), generator=generator)
    expected = prompt
    for _ in range(30):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(Runner(model, 2, 64).generate(prompt, 30), expected[:, 19:])


def test_windowed_cache_is_bounded(parent):
    model = load_model(parent)
    attention = parse_variant("attention", "window-8", model.spec).empty(model.spec)
    cache = KVCache(attention, 2, 1000, torch.zeros(()))
    assert cache.num_bytes == 2 * 2 * 2 * 8 * 8 * 4  # K and V, batch, KV heads, slots, head_dim, bytes


def test_measure_reports_bytes(parent):
    model = load_model(parent)
    found = measure({"a": (model, 2)}, Workload(input_len=8, output_len=4), repeats=1)["a"]
    assert found.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert found.kv_bytes == 4 * 2 * 2 * 2 * 8 * 12 * 4  # layers, K and V, batch, KV heads, head_dim, slots, bytes
    assert found.tokens_per_second > 0


@torch.no_grad()
def test_no_op_blocks_pass_everything_through(parent):
    model = load_model(parent)
    ids = torch.randint(0, 384, (1, 9))
    for index in range(len(model.blocks)):
        model.blocks[index] = Block(NoOp(), NoOp())
    assert torch.equal(model.hidden(ids), model.embedding(ids))


def test_unsupported_rope_is_named(tmp_path):
    config = LlamaConfig(**SHAPES, rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"dynamic.*not supported"):
        open_model(tmp_path)
