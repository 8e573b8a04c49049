"""The exported model against transformers' own classes, and against itself with and without a cache."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from puzzle.export.modeling_puzzle import CACHE_NAME, PuzzleConfig, PuzzleForCausalLM

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}
SKIP_ATTENTION, NO_LAYER = {"skip": ["attention"]}, {"skip": ["attention", "mlp"]}
LAYOUTS = {
    "identity": {},
    "kv heads and widths": {"0": {"num_key_value_heads": 1}, "2": {"intermediate_size": 8, "num_key_value_heads": 2}},
    "no attention in layer 0": {"0": SKIP_ATTENTION, "3": {"num_key_value_heads": 1}},
    "no attention in several": {"0": SKIP_ATTENTION, "1": {"linear": ["attention"]}, "4": SKIP_ATTENTION},
    "no attention at all": {
        "0": SKIP_ATTENTION,
        "1": {"linear": ["attention"]},
        "2": NO_LAYER,
        "3": SKIP_ATTENTION,
        "4": {"linear": ["attention", "mlp"]},
    },
    "windows": {"0": SKIP_ATTENTION, "1": {"sliding_window": 8}, "3": {"sliding_window": 5, "num_key_value_heads": 1}},
    "windows in all": {str(i): {"sliding_window": 1 + 6 * i} for i in range(5)},
    "everything": {
        "0": {"num_key_value_heads": 1, "sliding_window": 6},
        "1": SKIP_ATTENTION,
        "2": NO_LAYER,
        "3": {"linear": ["attention", "mlp"]},
        "4": {"skip": ["mlp"], "sliding_window": 100},
    },
}
GREEDY = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough for greedy text to vary, and norms and biases that are not ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.2 * noise if "norm" in name else 0.15 * noise
    model.tie_weights()
    return model.eval()


def child(per_layer: dict, **changes) -> PuzzleForCausalLM:
    config = {**SHAPE, "num_hidden_layers": 5, "num_key_value_heads": 4, "rope_parameters": dict(ROPES["default"])}
    return randomised(
        PuzzleForCausalLM(PuzzleConfig(**{**config, **changes}, per_layer_config=copy.deepcopy(per_layer)))
    )


def puzzle_like(model: nn.Module, **changes) -> PuzzleForCausalLM:
    """Our model of the same configuration and with the same weights, name by name."""
    taken = (*SHAPE, "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias")
    values = {key: copy.deepcopy(getattr(model.config, key)) for key in taken if hasattr(model.config, key)}
    ours = PuzzleForCausalLM(PuzzleConfig(**{**values, **changes})).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    return ours


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    ids = tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        ours_out = ours(ids, labels=ids, output_hidden_states=True)
        theirs_out = theirs(ids, labels=ids, output_hidden_states=True)
        assert torch.allclose(ours_out.logits, theirs_out.logits, rtol=0, atol=1e-4)
        assert torch.allclose(ours_out.loss, theirs_out.loss, rtol=0, atol=1e-4)
        assert len(ours_out.hidden_states) == len(theirs_out.hidden_states)
        for mine, reference in zip(ours_out.hidden_states, theirs_out.hidden_states, strict=True):
            assert torch.allclose(mine, reference, rtol=0, atol=1e-4)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = theirs(ids, attention_mask=mask, position_ids=positions).logits
        difference = (ours(ids, attention_mask=mask).logits - padded)[mask.bool()]
        assert difference.abs().max() <= 1e-5
    generated = ours.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(generated, theirs.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ["default", "llama3"])
def test_identity_child_equals_llama(rope, tied):
    config = LlamaConfig(**SHAPE, rope_parameters=dict(ROPES[rope]), tie_word_embeddings=tied)
    llama = randomised(LlamaForCausalLM(config))
    ours = puzzle_like(llama)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    assert_same_model(ours, llama)


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_identity_child_equals_llama_with_all_biases(rope):
    config = LlamaConfig(**SHAPE, rope_parameters=dict(ROPES[rope]), attention_bias=True, mlp_bias=True)
    llama = randomised(LlamaForCausalLM(config))
    assert_same_model(puzzle_like(llama), llama)


def test_identity_child_equals_qwen2():
    qwen = randomised(Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_parameters=dict(ROPES["default"]))))
    assert_same_model(puzzle_like(qwen, qkv_bias=True), qwen)


def test_identity_child_equals_qwen3():
    qwen = randomised(Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters=dict(ROPES["default"]))))
    assert_same_model(puzzle_like(qwen, qk_norm=True), qwen)


def test_global_window_equals_mistral():
    config = MistralConfig(**SHAPE, rope_parameters=dict(ROPES["default"]), sliding_window=8)
    mistral = randomised(MistralForCausalLM(config))
    assert_same_model(puzzle_like(mistral, sliding_window=8), mistral)


def test_window_in_some_layers_equals_qwen2_layer_types():
    types = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(
        **SHAPE, rope_parameters=dict(ROPES["default"]), use_sliding_window=True, sliding_window=8, layer_types=types
    )
    qwen = randomised(Qwen2ForCausalLM(config))
    assert_same_model(puzzle_like(qwen, qkv_bias=True, per_layer_config={"1": {"sliding_window": 8}}), qwen)


class Replaced(nn.Module):
    """Stands in a Llama layer for a sub-block that is skipped (no matrix) or linear."""

    def __init__(self, matrix: torch.Tensor | None, attention: bool):
        super().__init__()
        self.matrix, self.attention = matrix, attention

    def forward(self, hidden_states, **kwargs):
        matrix = torch.zeros(64, 64) if self.matrix is None else self.matrix
        out = hidden_states @ matrix.T
        return (out, None) if self.attention else out


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "windows" not in name])
def test_heterogeneous_child_equals_a_patched_llama(layout):
    """Llama with repeated KV heads, zero-padded FFNs, and replaced sub-blocks computes what the child computes."""
    layers = {int(i): {k: v for k, v in e.items() if k != "sliding_window"} for i, e in LAYOUTS[layout].items()}
    ours = child(layers)
    llama = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 5, "num_key_value_heads": 4})).eval()
    state = dict(ours.state_dict())
    for index, layer in enumerate(llama.model.layers):
        entry, prefix = layers.get(index, {}), f"model.layers.{index}."
        for block, name in (("attention", "self_attn"), ("mlp", "mlp")):
            norm = prefix + {"attention": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}[block]
            if block in entry.get("skip", ()):
                assert not [key for key in state if key.startswith((prefix + name, norm))]
                setattr(layer, name, Replaced(None, block == "attention"))
                state[norm] = torch.ones(64)
            elif block in entry.get("linear", ()):
                suffix = {"attention": "linear_attn", "mlp": "linear_mlp"}[block]
                setattr(layer, name, Replaced(state.pop(f"{prefix}{name}.{suffix}.weight"), block == "attention"))
        for key in ("k_proj", "v_proj"):
            if (weight := state.get(f"{prefix}self_attn.{key}.weight")) is not None:
                heads = weight.view(-1, 16, 64)
                state[f"{prefix}self_attn.{key}.weight"] = heads.repeat_interleave(4 // len(heads), 0).reshape(64, 64)
        for key in ("gate_proj", "up_proj", "down_proj"):
            if (weight := state.get(f"{prefix}mlp.{key}.weight")) is not None:
                padded = torch.zeros(64, 96) if key == "down_proj" else torch.zeros(96, 64)
                padded[: weight.shape[0], : weight.shape[1]] = weight
                state[f"{prefix}mlp.{key}.weight"] = padded
    llama.load_state_dict(state, strict=True)
    ids = tokens(2, 40)
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, llama(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_changes_nothing(layout):
    model = child(LAYOUTS[layout])
    ids = tokens(2, 9)
    cached = model.generate(ids, **GREEDY)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **GREEDY))
    assert len(set(cached[:, 9:].flatten().tolist())) > 8  # the text varies, so that the comparison means something
    with torch.no_grad():
        whole = model(cached, use_cache=False).logits
        cache, steps = DynamicCache(), []
        for part in cached.split([9, 4, *[1] * 60], dim=1):  # a prompt, a chunk, single tokens
            out = model(part, past_key_values=cache)
            cache = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_left_padded_batch_equals_each_alone(layout, use_cache):
    model = child(LAYOUTS[layout])
    prompts = [tokens(1, length, seed=length) for length in (3, 11, 7)]
    options = {**GREEDY, "max_new_tokens": 24, "min_new_tokens": 24, "use_cache": use_cache}
    ids = torch.cat([nn.functional.pad(prompt, (11 - prompt.shape[1], 0)) for prompt in prompts])
    batch = model.generate(ids, attention_mask=(ids != 0).long(), **options)
    for row, prompt in zip(batch, prompts, strict=True):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(row[11:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("layout", ["no attention in layer 0", "no attention at all", "everything"])
def test_beam_search(layout):
    model = child(LAYOUTS[layout])
    ids = nn.functional.pad(tokens(2, 8), (2, 0))
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 16, "attention_mask": (ids != 0).long()}
    beams = model.generate(ids, **options)
    assert torch.equal(beams, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(beams, model.generate(ids, **{**options, "num_beams": 1}))


def test_cache_slots_are_dense_and_windows_short():
    model = child(LAYOUTS["windows"])
    ids = tokens(2, 20)
    out = model(ids, past_key_values=DynamicCache(config=PuzzleConfig(**SHAPE)))  # one slot per layer: laid out anew
    assert [slot.keys.shape[2] for slot in out.past_key_values.layers] == [7, 20, 4, 20]
    assert [slot.keys.shape[1] for slot in out.past_key_values.layers] == [4, 4, 1, 4]
    assert out.past_key_values.get_seq_length() == 20
    empty = child(LAYOUTS["no attention at all"])(ids).past_key_values
    assert (len(empty.layers), empty.get_seq_length()) == (0, 0)


def test_generation_goes_on_from_a_returned_cache_and_by_lookup():
    model = child(LAYOUTS["windows"])
    ids = tokens(1, 9)
    whole = model.generate(ids, **GREEDY)
    start = model.generate(ids, do_sample=False, max_new_tokens=20, return_dict_in_generate=True)
    rest = model.generate(
        start.sequences,
        attention_mask=torch.ones_like(start.sequences),
        past_key_values=start.past_key_values,
        do_sample=False,
        max_new_tokens=44,
    )
    assert torch.equal(rest, whole)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), whole)
    assert torch.equal(model.generate(ids, prefill_chunk_size=4, **GREEDY), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_and_load_round_trip(layout, tmp_path):
    model = child(LAYOUTS[layout], tie_word_embeddings=layout == "everything")
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(loaded) is not PuzzleForCausalLM  # its code came out of the directory
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    ids = tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)

    loaded.save_pretrained(tmp_path / "second")
    for name in (
        "config.json",
        "modeling_puzzle.py",
        "modeling_puzzle_mamba.py",
        "modeling_puzzle_delta.py",
        "modeling_puzzle_recurrent.py",
        "modeling_puzzle_masks.py",
        "model.safetensors",
    ):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    wanted = {i: {k: sorted(v) if k == "skip" else v for k, v in entry.items()} for i, entry in LAYOUTS[layout].items()}
    assert saved.get("per_layer_config", {}) == wanted
    assert saved["architectures"] == ["PuzzleForCausalLM"]
    assert saved["auto_map"]["AutoModelForCausalLM"] == "modeling_puzzle.PuzzleForCausalLM"


def test_gradients_checkpointing_and_logits_to_keep():
    model = child(LAYOUTS["everything"]).train()
    ids = tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for grad in plain.values())
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # older releases of transformers 5 know the second name alone
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.allclose(weight.grad, plain[name], atol=1e-6) for name, weight in model.named_parameters())
    model.eval()
    whole = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=1).logits, whole[:, -1:], atol=1e-6)
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([3, 8])).logits, whole[:, [3, 8]], atol=1e-6)
    assert torch.allclose(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole)
    assert torch.equal(
        model.get_decoder()(ids).last_hidden_state, model(ids, output_hidden_states=True).hidden_states[-1]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    model = child(LAYOUTS["everything"])
    ids = tokens(2, 30)
    with torch.no_grad():
        exact = model(ids).logits
        rough = copy.deepcopy(model).to(dtype)(ids).logits.float()
    assert (rough - exact).pow(2).mean().sqrt() < 0.05 * exact.std()


def test_what_the_model_cannot_do_is_said():
    with pytest.raises(ValueError, match=r"per_layer_config\[2\].*'attention' and 'mlp'"):
        child({"2": {"skip": ["ffn"]}})
    with pytest.raises(ValueError, match=r"per_layer_config\[0\]"):
        child({"0": {"skip": ["mlp"], "linear": ["mlp"]}})
    with pytest.raises(ValueError, match=r"per_layer_config\[1\] has linear_rank={'mlp': 8} beside linear=\[\]"):
        child({"1": {"linear_rank": {"mlp": 8}}})
    with pytest.raises(ValueError, match="rope_type 'spiral' is not supported"):
        child({}, rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0, "factor": 2.0})
    dynamic = child({}, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ValueError, match=r"rope_type 'dynamic' beyond 256 tokens \(257 came\)"):
        dynamic(tokens(1, 257))
    with pytest.raises(ValueError, match=r"per_layer_config\[1\] has rope 'far': \['default'\] and null are known"):
        child({"1": {"rope": "far"}})
    with pytest.raises(ValueError, match="qk_norm 'heads' is not understood"):
        child({}, qk_norm="heads")
    with pytest.raises(ValueError, match="norm_placement 'behind' is not understood"):
        child({}, norm_placement="behind")
    model = child(LAYOUTS["kv heads and widths"])
    ids = tokens(2, 8)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5\] instead of \[2, 8\]"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(config=LlamaConfig(**SHAPE), max_cache_len=16))


def test_a_cache_that_longrope_has_left_behind_is_refused():
    """Every key depends on the frequencies of the layers below, so that the text goes through again; `generate` sees to it."""
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12, **factors}
    model = child({"2": {"sliding_window": 5}}, rope_parameters=longrope)
    ids = tokens(2, 16)
    with torch.no_grad():
        start = model(ids[:, :12], use_cache=True)
        with pytest.raises(ValueError, match="give the whole text without a cache"):
            model(ids[:, 12:], past_key_values=getattr(start, CACHE_NAME))
        within, beyond = (model(ids[:, :length], use_cache=False).logits for length in (12, 16))
        assert torch.allclose(start.logits, within, atol=1e-4)
        cache = getattr(model(ids[:, :13]), CACHE_NAME)
        assert torch.allclose(model(ids[:, 13:], past_key_values=cache).logits, beyond[:, 13:], atol=1e-4)
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    prompt = ids[:, :7]
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


def test_layer_numbers_of_two_digits(tmp_path):
    """transformers pads the keys of `per_layer_config` when it saves; both spellings mean the same layers."""
    model = child({"3": SKIP_ATTENTION, "11": {"num_key_value_heads": 1}}, num_hidden_layers=12)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    assert saved == {"03": SKIP_ATTENTION, "11": {"num_key_value_heads": 1}}
    assert [layer.attends for layer in PuzzleForCausalLM.from_pretrained(tmp_path).model.layers].index(False) == 3


def test_training_after_inference_mode():
    model = child({})
    with torch.inference_mode():
        model(tokens(1, 5))
    model.train()(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
    assert copy.deepcopy(model).eval()(tokens(1, 5)).logits.shape == (1, 5, 128)
