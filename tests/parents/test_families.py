"""Every family against transformers: logits, generation, and the whole road from the library to an exported child."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from puzzle.base.errors import UserError
from puzzle.export.engines import ENGINES
from puzzle.export.write import export, open_source
from puzzle.parents.opened import families, open_model
from puzzle.runtime.model import load_model
from puzzle.runtime.plain import PlainRuntime
from tiny_parents import PARENTS, PLAIN

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, 384, (batch, length), generator=torch.Generator().manual_seed(length))


def theirs(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def sound(name: str, *lengths: int) -> list[int]:
    """Those at which this transformers is right: 5.14 sums Mamba-2's chunks (of 8 tokens here) along the wrong axis."""
    wrong = name == "nemotron_h" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17)
    return [length for length in lengths if not wrong or length <= 8]


def greedy(model, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """[T] -> [count], from whole forwards of ours, without a cache"""
    ids = prompt
    for _ in range(count):
        ids = torch.cat((ids, model(ids[None])[0, -1].argmax()[None]))
    return ids[len(prompt) :]


@torch.no_grad()
def test_logits(name, family_parent):
    """At lengths within windows, beyond them, and beyond the length from which longrope has other frequencies."""
    directory = family_parent(name)
    opened = open_model(str(directory))
    opened.check()
    ours, reference = load_model(opened), theirs(directory)
    for length in sound(name, 5, 31, 32, 33, 77):
        ids = tokens(2, length)
        wanted = reference(ids, use_cache=False).logits
        assert wanted.std() > 0.1
        assert (ours(ids) - wanted).abs().max() <= 1e-4


@torch.no_grad()
def test_our_runtime_generates_what_theirs_does(name, family_parent):
    directory = family_parent(name)
    if name.startswith("nemotron_h"):
        try:
            DynamicCache(config=AutoConfig.from_pretrained(directory))
        except KeyError as error:
            pytest.skip(f"this transformers has no cache for blocks of type {error}")
    ids, reference = tokens(2, 21), theirs(directory)
    try:
        wanted = reference.generate(ids, max_new_tokens=11, **GREEDY)[:, 21:]
    except ValueError as error:
        if "has_previous_state" not in str(error):
            raise
        pytest.skip("this transformers has no cache for a granitemoehybrid without Mamba-2")
    assert torch.equal(PlainRuntime(load_model(directory), 2, 32).generate(ids, 11), wanted)


@torch.no_grad()
def test_as_a_child_of_itself(name, family_parent, tmp_path):
    """Exported without a change: the same logits, also with a cache that crosses longrope's switch, and padded on the left."""
    directory = family_parent(name)
    written = export(open_source(directory), tmp_path / "child")
    child, reference = theirs(written.out, trust_remote_code=True), theirs(directory)
    for length in sound(name, 7, 31, 33, 77):
        ids = tokens(2, length)
        assert (child(ids).logits - reference(ids, use_cache=False).logits).abs().max() <= 1e-4
    assert open_model(str(written.out)).structure == open_model(str(directory)).structure
    long, short = tokens(1, 27)[0], tokens(1, 9)[0]
    ids = torch.stack((long, torch.cat((torch.ones(18, dtype=torch.long), short))))
    mask = torch.ones_like(ids)
    mask[1, :18] = 0
    ours = load_model(directory)
    for options in ({}, {"use_cache": False}):
        batch = child.generate(ids, attention_mask=mask, max_new_tokens=12, **options, **GREEDY)[:, 27:]
        for row, prompt in zip(batch, (long, short), strict=True):
            assert torch.equal(row, greedy(ours, prompt, 12))


def test_from_library_to_generation(name, family_parent, corpus, tmp_path, puzzle):
    """build-library, profile, solve, export, generate: with a cache, padded on the left, token for token what we compute."""
    library, child = tmp_path / "lib", tmp_path / "child"
    build = ("--tokens", 128, "--seq-len", 32, "--batch-size", 2, "--calibration-sequences", 2)
    held = (
        "--validation-sequences",
        2,
        "--score-sequences",
        2,
        "--attention",
        "kv1,linear,none",
        "--ffn",
        PARENTS[name].ffn,
    )
    grid = ("--batches", 1, "--prefill", 16, "--contexts", "16,32", "--seconds", 0.001, "--rounds", 1)
    goal = ("--gpu", "cpu", "--params", "95%", "--input-len", 16, "--output-len", 16)
    for arguments in (
        ("build-library", family_parent(name), "--data", corpus, "--out", library, *build, *held),
        ("profile", library, "--gpu", "cpu", *grid),
        ("solve", library, *goal),
        ("export", library, library / "solution", "--out", child),
    ):
        done = puzzle(*arguments)
        assert done.exit_code == 0, done.output
    assert json.loads((child / "config.json").read_text())["per_layer_config"] != {}
    ours, written = load_model(child), theirs(child, trust_remote_code=True)
    ids = tokens(2, 33)
    with torch.no_grad():
        assert (written(ids).logits - ours(ids)).abs().max() <= 1e-4
    padded = torch.cat((torch.ones(1, 14, dtype=torch.long), tokens(1, 19)), dim=1)
    batch = torch.cat((tokens(1, 33), padded))
    mask = torch.ones_like(batch)
    mask[1, :14] = 0
    found = written.generate(batch, attention_mask=mask, max_new_tokens=16, **GREEDY)[:, 33:]
    for row, prompt in zip(found, (batch[0], batch[1, 14:]), strict=True):
        assert torch.equal(row, greedy(ours, prompt, 16))


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_take_it_or_refuse_it_by_name(name, engine, family_parent, tmp_path):
    source = open_source(family_parent(name))
    if engine in PARENTS[name].engines:
        assert export(source, tmp_path / "child", engine=engine).engine == engine
        return
    with pytest.raises(UserError, match=r"`format` hf") as refused:
        export(source, tmp_path / "child", engine=engine)
    assert engine in str(refused.value)
    assert not (tmp_path / "child").exists()


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config.weight_block_size = None .* not read",
        ),
        ("llama", {"per_layer_config": {"1": {"num_key_value_heads": 1}}}, "per_layer_config = .* layers that differ"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ("llama", {"rope_parameters": {**PLAIN, "rope_type": "spiral"}}, "RoPE type 'spiral'|transformers cannot read"),
        ("llama", {"rope_parameters": {**PLAIN, "llama_4_scaling_beta": 0.1}}, "parameter 'llama_4_scaling_beta'"),
        (
            "qwen3",
            {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},
            r"layer_types\[3\] = 'linear_attention'",
        ),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 .* tanh on the logits"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba", "moe"], "n_shared_experts": 2},
            "n_shared_experts = 2 in config.json is not supported beside experts: one is",
        ),
        ("nemotron_h", {"sliding_window": 8}, "sliding_window = 8 .* windows, which transformers passes over"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' in config.json is not supported: relu2 is"),
        ("nemotron_h", {"mamba_proj_bias": True}, "mamba_proj_bias in config.json asks for biases"),
        (
            "nemotron_h",
            {"time_step_limit": [0.0, 0.5]},
            r"time_step_limit = \[0.0, 0.5\] in config.json is not supported: steps of time without limits",
        ),
        ("nemotron_h", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1 .* is not understood"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, "use_sliding_window turns off"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(model_type, changes, message, family_parent, tmp_path):
    source = family_parent(next(name for name, made in PARENTS.items() if made.model_type == model_type))
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message) as refused:
        open_model(str(tmp_path))
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_field_that_only_transformers_knows(family_parent, tmp_path, monkeypatch):
    """A Granite read as a Llama, whose family knows nothing of multipliers: refused by their names."""
    source = family_parent("granite")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    monkeypatch.setitem(families(), "granite", families()["llama"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"_multiplier = .* is not understood for models of type 'granite'|logits_scaling"
    ):
        open_model(str(tmp_path))
