"""What an engine cannot take and no rewrite helps: exit code 2, one line with layer, sub-block, engine and the nearest choice."""

from dataclasses import replace

import pytest

from puzzle.export.checkpoint import write_checkpoint
from puzzle.export.hf import hf_config

FULL_ATTENTION = "the nearest choice is full attention with 4 KV heads"
SWIGLU = "the nearest choice is a narrow SwiGLU or 'none'"


@pytest.mark.parametrize(
    ("child", "engine", "wanted"),
    [
        ("window", "llama.cpp", ("layer 1 attention", FULL_ATTENTION, "--engine vllm")),
        ("window", "mlx", ("layer 1 attention", FULL_ATTENTION, "--engine vllm")),
        ("window", "sglang", ("layer 1 attention", FULL_ATTENTION, "--engine vllm")),
        ("window", "tensorrt-llm", ("layer 1 attention", FULL_ATTENTION, "--engine vllm")),
        ("linear-ffn", "sglang", ("layer 1 ffn", SWIGLU, "--engine vllm, llama.cpp or mlx")),
        ("linear-attention", "sglang", ("layer 0 attention", "the nearest choice is attention 'none' or 'kv1'")),
        ("two-windows", "vllm", ("layer 2 attention", "the nearest choice is window-16")),
        ("qk-norm", "vllm", ("layer 0 attention", "write --format hf")),
        ("head-dim", "mlx", ("layer 0 attention", "takes head_dim", "--engine vllm, llama.cpp")),
        ("biases", "tensorrt-llm", ("layer 0 attention", "reads no biases", "--engine vllm, llama.cpp")),
        ("ffn-biases", "sglang", ("layer 0 ffn", "reads no biases of FFNs", "--engine vllm, llama.cpp or mlx")),
    ],
)
def test_refused_before_anything_is_written(child, engine, wanted, tiny, tmp_path, puzzle):
    window = {size: (replace(tiny.FULL, window=size), tiny.FFN) for size in (16, 32)}
    one = tiny.Tiny(layers=(tiny.BLOCK,))
    others = {
        "two-windows": tiny.Tiny(layers=(tiny.BLOCK, window[16], window[32])),
        "qk-norm": one.but({"qk_norm": "head"}),
        "head-dim": one.but({"head_dim": 64}),
        "biases": one.but({"qkv_bias": True, "o_bias": True}),
        "ffn-biases": one.but(ffn={"bias": True}),
    }
    built = tiny.build(child, others.get(child) or tiny.CHILDREN[child])
    write_checkpoint(
        tmp_path / "child",
        config=hf_config(built, built.dtype),
        tensors=built.tensors(),
        tokenizer_from=None,
        generation_config=None,
        card="",
    )
    done = puzzle("export", tmp_path / "child", "--engine", engine, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    message = " ".join(done.output.split())
    for part in (*wanted, engine):
        assert part in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["child"]
    done = puzzle("export", tmp_path / "child", "--out", tmp_path / "out")  # transformers takes every child
    assert done.exit_code == 0, done.output
