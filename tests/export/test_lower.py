"""Every lowering computes the same logits, names its layers and tells its price; what has none is refused."""

from dataclasses import replace

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP, NoOp
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.child import with_dtype
from puzzle.export.engines import ANY_DECILM_READER, ENGINES, HYBRIDS, STOCK, pick_format
from puzzle.export.lower import equal_kv_heads, linear_ffn_as_swiglu, lower, pad_widths

REFUSED = {
    ("window", "llama.cpp"),
    ("window", "mlx"),
    ("window", "sglang"),
    ("window", "tensorrt-llm"),
    ("linear-attention", "sglang"),
    ("linear-ffn", "sglang"),
    ("low-rank", "sglang"),
}


def ids(length=24):
    return torch.randint(2, 384, (2, length), generator=torch.Generator().manual_seed(0))


def formats(engine):
    """In which children like a Llama are written."""
    return [format for format in ENGINES[engine].formats if format not in (*STOCK, *HYBRIDS)]


def assert_takes(engine, child, format):
    """The row of the table, read from the child: an independent statement of what each engine needs."""
    assert all(part.rank is None for part in child.sub_blocks if isinstance(part, Linear))
    attentions = [layer.attention for layer in child.layers]
    ffns = [layer.ffn for layer in child.layers]
    assert not any(layer.is_empty for layer in child.layers)
    assert any(isinstance(a, Gqa) for a in attentions)
    if engine in ("vllm", "sglang"):
        assert isinstance(attentions[0], Gqa)
        assert not any(isinstance(part, Linear) for part in (*attentions, *ffns))
    if engine == "sglang":
        assert len({a.num_key_value_heads for a in attentions if isinstance(a, Gqa)}) == 1
    if engine == "llama.cpp":
        assert not isinstance(attentions[0], NoOp)
        assert all(isinstance(f, SwiGLU) for f in ffns)
    if engine == "mlx":
        assert not any(isinstance(a, Linear) for a in attentions)
    if format == "nemotron-nas" and engine != "vllm":
        assert all(f.intermediate_size % 256 == 0 for f in ffns if isinstance(f, SwiGLU))


@pytest.mark.parametrize("engine", list(ENGINES))
def test_lowered_children_compute_the_same(name, engine, tiny, child_logits):
    child = tiny.build(name, replace(tiny.ALL[name], rope=None))
    want = child_logits(child, ids())
    for format in formats(engine):
        if (name, engine) in REFUSED:
            with pytest.raises(UserError, match=rf"layer \d (attention|ffn): {engine} "):
                lower(child, engine, format)
            continue
        lowered, done = lower(child, engine, format)
        assert_takes(engine, lowered, format)
        rounded = any(item.name == "low-rank-as-matrix" for item in done)  # once, to the child's float32
        assert (child_logits(lowered, ids()) - want).abs().max() < (1e-5 if rounded else 1e-9) * want.std()
        assert sum(item.num_parameters for item in done) == lowered.num_parameters - child.num_parameters
        stored = sum(tensor.numel() for _, tensor in lowered.tensors())
        assert stored == lowered.num_parameters
        kv = lowered.kv_elements_per_token - child.kv_elements_per_token
        assert sum(item.kv_bytes_per_token for item in done) == 4 * kv
        assert all(item.layers and max(item.layers) < len(child.layers) for item in done)


def test_what_is_printed(tiny):
    _, done = lower(tiny.tiny_child("no-attention-first"), "sglang", "nemotron-nas")
    assert [str(item) for item in done] == [
        "zero-attention: layer 0: no attention in the first layer: attention with one KV head and a zero output "
        "(+147,712 parameters, KV cache 1,536 to 1,792 bytes per token)",
        "equal-kv-heads: layers 0, 1: KV heads repeated, so that all layers have as many "
        "(+81,920 parameters, KV cache 1,792 to 3,072 bytes per token)",
    ]
    _, done = lower(tiny.tiny_child("empty-layers"), "vllm", "nemotron-nas")
    assert [str(item) for item in done] == [
        "drop-empty-layers: layers 0, 2, 4: neither attention nor FFN: left out (costs nothing)"
    ]


def test_nothing_is_done_without_need(tiny):
    for engine in (None, *ENGINES):
        child = tiny.build("plain", tiny.Tiny(layers=(tiny.BLOCK,) * 3))
        assert lower(child, engine, formats(engine)[0] if engine else "hf") == (child, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_linear_ffn_as_swiglu_gives_the_matrix_its_input_unrounded(tiny, dtype):
    child = tiny.build("one", tiny.Tiny(layers=((NO_OP, tiny.LINEAR),)))
    lowered, touched = linear_ffn_as_swiglu(child)
    assert touched == [0]
    assert lowered.ffn.bias
    weights = {key: value.to(dtype) for key, value in lowered.layers[0].read("ffn").items()}
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    if dtype == torch.float16:
        x = x.where(x.abs() > 0.01, 0)  # below 2⁻⁸ a 64th is a subnormal number, and rounds
    gate = x @ weights["gate_proj.weight"].T + weights["gate_proj.bias"]
    up = x @ weights["up_proj.weight"].T + weights["up_proj.bias"]
    assert torch.equal(torch.nn.functional.silu(gate) * up, x)
    assert torch.equal(weights["down_proj.weight"], child.layers[0].read("ffn")["linear.weight"].to(dtype))


def test_low_rank_as_an_engine_takes_it(tiny):
    """A SwiGLU as wide as the rank, or one matrix, whichever an engine has; the matrix is the product, rounded once."""
    child = with_dtype(
        tiny.build("low", tiny.Tiny(layers=(tiny.BLOCK, (tiny.low_rank(24), tiny.low_rank(40))))), torch.bfloat16
    )
    found, done = lower(child, "vllm", "nemotron-nas")
    assert [layer.ffn.intermediate_size for layer in found.layers] == [512, 24, 40]
    assert [item.name for item in done] == ["linear-attention-as-ffn", "linear-ffn-as-swiglu"]
    found, done = lower(child, None, "nemotron-nas")
    assert (found.layers[1].attention, found.layers[1].ffn) == (tiny.LINEAR, tiny.LINEAR)
    assert [(item.name, item.layers) for item in done] == [("low-rank-as-matrix", (1,))]
    assert done[0].num_parameters == 2 * 256**2 - 2 * 256 * (24 + 40)
    for slot in ("attention", "ffn"):
        own, matrix = child.layers[1].read(slot), found.layers[1].read(slot)["linear.weight"]
        exact = own["linear.u.weight"].double() @ own["linear.v.weight"].double()
        assert matrix.dtype == torch.bfloat16
        assert ((matrix.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_biases_everywhere(tiny, child_logits):
    """Qwen2's biases on q, k and v, a child with all biases, and what the lowerings make of them."""
    linear, full = tiny.LINEAR, tiny.BLOCK
    layers = (full, (tiny.kv(1), tiny.width(80)), (tiny.kv(2), linear), (NO_OP, NO_OP), (linear, tiny.FFN))
    plain = tiny.Tiny(layers=layers)
    qkv = tiny.build("qkv", plain.but({"qkv_bias": True}))
    everywhere = tiny.build(
        "all", replace(plain, tied=True).but({"qkv_bias": True, "o_bias": True}, ffn={"bias": True})
    )
    for child in (qkv, everywhere):
        want = child_logits(child, ids())
        for engine in ("vllm", "llama.cpp", "mlx"):
            lowered, _ = lower(child, engine, "nemotron-nas")
            assert (child_logits(lowered, ids()) - want).abs().max() < 1e-9 * want.std()
    assert lower(qkv, "mlx", "nemotron-nas")[0].attention.o_bias
    assert not lower(qkv, "vllm", "nemotron-nas")[0].attention.o_bias
    only_kv = tiny.build("kv", tiny.Tiny(layers=layers[:2]).but({"qkv_bias": True}))
    lowered, done = lower(only_kv, "sglang", "nemotron-nas")
    assert [item.name for item in done] == ["zero-output-bias", "equal-kv-heads", "zero-padded-ffn"]
    want = child_logits(only_kv, ids())
    assert (child_logits(lowered, ids()) - want).abs().max() < 1e-9 * want.std()


def test_kv_heads_meet_at_their_common_multiple(tiny, child_logits):
    layers = ((tiny.kv(2), tiny.FFN), (tiny.kv(3), tiny.FFN))
    child = tiny.build("lcm", tiny.Tiny(layers=layers).but({"num_attention_heads": 12, "head_dim": 16}))
    lowered, touched = equal_kv_heads(child)
    assert [layer.attention.num_key_value_heads for layer in lowered.layers] == [6, 6]
    assert touched == [0, 1]
    assert torch.allclose(child_logits(lowered, ids()), child_logits(child, ids()), rtol=0, atol=1e-9)


def test_children_without_any_attention(tiny, child_logits):
    linear = tiny.LINEAR
    for layers in (((NO_OP, NO_OP),) * 2, ((NO_OP, tiny.FFN),), ((linear, linear),), ((linear, NO_OP),) * 2):
        child = tiny.build("none", tiny.Tiny(layers=layers))
        want = child_logits(child, ids())
        for engine in ("vllm", "llama.cpp", "mlx", "tensorrt-llm"):
            lowered, _ = lower(child, engine, formats(engine)[0])
            assert_takes(engine, lowered, formats(engine)[0])
            assert (child_logits(lowered, ids()) - want).abs().max() < 1e-9 * want.std()


def test_pad_widths_by_any_step(tiny, child_logits):
    child = tiny.tiny_child("odd-widths")
    lowered, touched = pad_widths(child, 100)
    assert [layer.ffn.intermediate_size for layer in lowered.layers] == [400, 100, 600]
    assert touched == [0, 1, 2]
    assert torch.allclose(child_logits(lowered, ids()), child_logits(child, ids()), rtol=0, atol=1e-9)


def window(tiny, size):
    return (replace(tiny.FULL, window=size), tiny.FFN)


@pytest.mark.parametrize(
    ("engine", "attention", "ffn", "message"),
    [
        ("vllm", {"qk_norm": "head"}, {}, r"layer 0 attention: vllm has no per-head norms .*`format` hf"),
        (
            "mlx",
            {"head_dim": 64},
            {},
            r"layer 0 attention: mlx takes head_dim = .* = 32 alone.*is 64: use `engine` vllm,",
        ),
        (
            "tensorrt-llm",
            {"o_bias": True},
            {},
            r"layer 0 attention: tensorrt-llm reads no biases .*`engine` vllm, llama",
        ),
        (
            "sglang",
            {},
            {"bias": True},
            r"layer 0 ffn: sglang reads no biases of FFNs: use `engine` vllm, llama.cpp or mlx",
        ),
        (None, {"qk_norm": "head"}, {}, r"layer 0 attention: a reader of nemotron-nas has no per-head norms"),
    ],
)
def test_refused_fields(tiny, engine, attention, ffn, message):
    child = tiny.build("refused", tiny.Tiny(layers=(tiny.BLOCK,)).but(attention, ffn))
    with pytest.raises(UserError, match=message):
        lower(child, engine, "nemotron-nas")


def test_refused_windows(tiny):
    two = tiny.build("two", tiny.Tiny(layers=(tiny.BLOCK, window(tiny, 16), window(tiny, 32))))
    with pytest.raises(
        UserError, match=r"layer 2 attention: vllm takes windows of one size.* 32 after one of 16: .*window-16"
    ):
        lower(two, "vllm", "nemotron-nas")
    one = tiny.tiny_child("window")
    with pytest.raises(
        UserError, match=r"layer 1 attention: llama.cpp takes no sliding window .*is 16.*full attention with 4"
    ):
        lower(one, "llama.cpp", "gguf")
    with pytest.raises(
        UserError, match=r"a reader of nemotron-nas takes no sliding window .*`engine` vllm, or `format` hf"
    ):
        lower(one, None, "nemotron-nas")
    far = tiny.build("far", tiny.Tiny(layers=(window(tiny, 512), tiny.BLOCK)))  # the whole context: no window at all
    assert lower(far, "llama.cpp", "gguf")[1] == []
    assert ANY_DECILM_READER.windows == "none"


def test_pick_format():
    assert pick_format(None, None) == ("hf", None)
    assert pick_format(None, "vllm") == ("nemotron-nas", "vllm")
    assert pick_format(None, "llama.cpp") == ("gguf", "llama.cpp")
    assert pick_format("gguf", None) == ("gguf", "llama.cpp")
    assert pick_format("nemotron-nas", None) == ("nemotron-nas", None)
    with pytest.raises(UserError, match="unknown engine 'vlm': did you mean 'vllm'"):
        pick_format(None, "vlm")
    with pytest.raises(UserError, match="unknown format 'ggml': did you mean 'gguf'"):
        pick_format("ggml", None)
    with pytest.raises(UserError, match="`engine` vllm does not read `format` hf: pass `format` nemotron-nas"):
        pick_format("hf", "vllm")
