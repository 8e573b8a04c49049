"""config.json of `--format nemotron-nas`: exactly the keys that its readers know, and widths that they round to themselves."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.lower import lower
from puzzle.export.nemotron_nas import decilm_config, decilm_tensors, ffn_mult

ATTENTION_KEYS = {
    "n_heads_in_group", "no_op", "replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "unshifted_sink",
    "use_prefill_window_in_sink_attention",
}  # fmt: skip
FFN_KEYS = {"ffn_mult", "no_op", "replace_with_linear", "sparsify"}


def reader_width(multiple: float, hidden_size: int) -> int:
    """As vLLM, SGLang, mlx-lm, TensorRT-LLM and llama.cpp's converter compute it."""
    width = int(2 * multiple * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


@given(st.integers(1, 512), st.integers(1, 2048).map(lambda n: 8 * n))
def test_ffn_mult_comes_back_as_the_width(steps, hidden_size):
    width = 256 * steps
    multiple = ffn_mult(width, hidden_size)
    assert reader_width(multiple, hidden_size) == width
    assert reader_width(json.loads(json.dumps(multiple)), hidden_size) == width


def test_config(name, tiny):
    if name == "window":
        return  # refused without an engine: test_lower.py
    child, _ = lower(tiny.tiny_child(name), None, "nemotron-nas")
    config = decilm_config(child, None)
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert (config["model_type"], config["intermediate_size"], config["num_key_value_heads"]) == (
        "nemotron-nas",
        None,
        None,
    )
    assert {"rope_theta", "rope_scaling", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings"} <= set(
        config
    )
    assert len(config["block_configs"]) == config["num_hidden_layers"] == len(child.layers)
    names = {tensor_name for tensor_name, _ in decilm_tensors(child, None)}
    for index, (block, layer) in enumerate(zip(config["block_configs"], child.layers, strict=True)):
        assert set(block) == {"attention", "ffn"}
        attention, ffn = block["attention"], block["ffn"]
        assert (set(attention), set(ffn)) == (ATTENTION_KEYS, FFN_KEYS)
        parts = (
            (attention, layer.attention, "n_heads_in_group", "input_layernorm", "self_attn.linear_attn"),
            (ffn, layer.ffn, "ffn_mult", "post_attention_layernorm", "mlp.linear_mlp"),
        )
        for entry, sub_block, key, norm, matrix in parts:
            absent, linear = isinstance(sub_block, NoOp), isinstance(sub_block, Linear)
            assert entry["no_op"] is absent
            assert entry["replace_with_linear"] is linear
            assert (entry[key] is None) == (absent or linear)
            assert entry["sparsify"] is None
            prefix = f"model.layers.{index}."
            assert (f"{prefix}{norm}.weight" in names) == (not absent)  # a no-op has no norm either
            assert (f"{prefix}{matrix}.weight" in names) == linear
        if isinstance(layer.attention, Gqa):
            assert 8 // attention["n_heads_in_group"] == layer.attention.num_key_value_heads
        if isinstance(layer.ffn, SwiGLU):
            assert reader_width(ffn["ffn_mult"], tiny.HIDDEN) == layer.ffn.intermediate_size


def test_exact_widths_for_vllm_alone(tiny):
    child, lowerings = lower(tiny.tiny_child("odd-widths"), "vllm", "nemotron-nas")
    assert lowerings == []
    ffns = [block["ffn"] for block in decilm_config(child, "vllm")["block_configs"]]
    assert [ffn.get("intermediate_size") for ffn in ffns] == [352, 16, None]
    assert ["ffn_mult" in ffn for ffn in ffns] == [False, False, True]
    with pytest.raises(ValueError, match="layer 0: FFN width 352 was not padded"):
        decilm_config(child, None)


def test_windows_and_rope(tiny):
    window = decilm_config(tiny.tiny_child("window"), "vllm")
    assert (window["sliding_window"], window["layer_types"]) == (
        16,
        ["full_attention", "sliding_attention", "full_attention"],
    )
    rope = decilm_config(tiny.tiny_child("llama3-rope"), None)
    assert rope["rope_theta"] == 500000.0
    assert rope["rope_scaling"] == {key: value for key, value in tiny.LLAMA3.items() if key != "rope_theta"}
    plain = decilm_config(tiny.tiny_child("kv-heads"), None)
    assert (plain["rope_theta"], plain["rope_scaling"]) == (10000.0, None)
    with pytest.raises(UserError, match="no per-head norms"):
        decilm_config(tiny.build("qwen3", tiny.Tiny(layers=(tiny.BLOCK,)).but({"qk_norm": "head"})), None)


def test_facts_of_the_parent_are_passed_on(tiny):
    child = tiny.build("facts", tiny.Tiny(layers=(tiny.BLOCK,), tied=True).but({"qkv_bias": True}))
    config = decilm_config(replace(child, eos_token_id=[0, 7], dtype=torch.bfloat16), None)
    assert config["eos_token_id"] == [0, 7]
    assert (config["attention_bias"], config["qkv_bias"]) == (False, True)
    assert (config["tie_word_embeddings"], config["dtype"], config["torch_dtype"]) == (True, "bfloat16", "bfloat16")


def test_on_disk(tiny_checkpoint, tmp_path, puzzle):
    done = puzzle("export", tiny_checkpoint("linear-ffn"), "--format", "nemotron-nas", "--out", tmp_path / "child")
    assert done.exit_code == 0, done.output
    files = {path.name for path in (tmp_path / "child").iterdir()}
    assert {
        "configuration_decilm.py",
        "modeling_decilm.py",
        "modeling_puzzle.py",
        "README.md",
        "manifest.json",
    } <= files
    config = AutoConfig.from_pretrained(tmp_path / "child", trust_remote_code=True)
    assert config.block_configs[1].ffn.replace_with_linear is True  # objects with attributes, as vLLM reads them
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (
        config.to_dict()["block_configs"]
        == json.loads((tmp_path / "child" / "config.json").read_text())["block_configs"]
    )
    with safe_open(tmp_path / "child" / "model.safetensors", "pt") as handle:
        assert "model.layers.1.mlp.linear_mlp.weight" in handle.keys()  # noqa: SIM118
