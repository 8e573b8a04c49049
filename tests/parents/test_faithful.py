"""Whatever transformers does with a checkpoint is done here too, or refused by name: found by replaying public reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from puzzle.base.errors import UserError
from puzzle.data.packing import load_tokens
from puzzle.export.gguf_tokenizer import tokenizer_metadata
from puzzle.export.write import export, open_source
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from tiny_parents import write_tiny_parent

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_tiny_parent("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def checkpoint(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


def configure(directory: Path, **values) -> None:
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def reweigh(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"})


def logits(directory: Path, length: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and transformers'."""
    ids = torch.randint(2, 380, (1, length), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return load_model(open_model(directory))(ids), theirs(ids).logits


def test_a_head_of_its_own_beside_a_tied_config(checkpoint, tmp_path):
    """transformers keeps both; every export does."""
    configure(checkpoint, tie_word_embeddings=True)
    reweigh(checkpoint, lambda w: w.update({HEAD: torch.randn_like(w[EMBEDDING]) / 8}))
    ours, theirs = logits(checkpoint)
    assert torch.allclose(ours, theirs, atol=1e-4)
    for format in ("hf", "nemotron-nas"):
        out = tmp_path / format
        export(open_source(checkpoint), out, format=format)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.allclose(load_model(open_model(out))(torch.arange(2, 26)[None]), load_model(checkpoint)(torch.arange(2, 26)[None]), atol=1e-4)  # fmt: skip


def test_a_tied_model_stored_under_the_heads_name(checkpoint, tmp_path):
    configure(checkpoint, tie_word_embeddings=True)
    reweigh(checkpoint, lambda w: w.update({HEAD: w.pop(EMBEDDING)}))
    ours, theirs = logits(checkpoint)
    assert torch.allclose(ours, theirs, atol=1e-4)
    export(open_source(checkpoint), tmp_path / "out", format="hf")
    assert torch.allclose(load_model(open_model(tmp_path / "out"))(torch.arange(2, 26)[None]), load_model(checkpoint)(torch.arange(2, 26)[None]), atol=1e-4)  # fmt: skip


def test_an_equal_head_stays_tied(checkpoint):
    configure(checkpoint, tie_word_embeddings=True)
    reweigh(checkpoint, lambda w: w.update({HEAD: w[EMBEDDING].clone()}))
    assert open_model(checkpoint).structure.tied


def test_a_window_that_the_family_has_by_default(tmp_path):
    """Mistral without `sliding_window` sees 4,096 tokens."""
    directory = write_tiny_parent("mistral", tmp_path)
    configure(directory, sliding_window=..., max_position_embeddings=8192)
    assert {layer["attention"].window for layer in open_model(directory).structure.layers} == {4096}
    ours, theirs = logits(directory, 4500)
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_heads_that_do_not_divide_the_hidden_size(family, tmp_path):
    sizes = {"hidden_size": 60, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    sizes |= {"sliding_window": None} if family == "mistral" else {}
    ours, theirs = logits(write_tiny_parent(family, tmp_path / "parent", **sizes))
    assert torch.allclose(ours, theirs, atol=1e-4)
    for format in ("hf", "nemotron-nas") if family == "mistral" else ("hf",):
        export(open_source(tmp_path / "parent"), tmp_path / format, format=format)
        ids = torch.arange(2, 26)[None]
        child = AutoModelForCausalLM.from_pretrained(tmp_path / format, dtype=torch.float32, trust_remote_code=True)
        with torch.no_grad():
            assert torch.allclose(child(ids).logits, load_model(tmp_path / "parent")(ids), atol=1e-4)


QUANTISED = [
    {"quant_method": "bitsandbytes", "load_in_8bit": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "compressed-tensors"},
]


@pytest.mark.parametrize("config", QUANTISED, ids=lambda c: c["quant_method"])
@pytest.mark.parametrize("own", [False, True], ids=["parent", "child"])
def test_quantised_checkpoints_are_refused(config, own, checkpoint, tmp_path):
    directory = checkpoint
    if own:
        directory = tmp_path / "child"
        export(open_source(checkpoint), directory, format="hf")
    configure(directory, quantization_config=config)
    with pytest.raises(
        UserError,
        match=r"quantization_config.* in config.json asks for .* not read|no weight is stored as F8_E4M3|quantization_config.config_groups = None",
    ):
        open_model(directory)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_word_in_the_config(dtype, checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"
    reweigh(checkpoint, lambda w: w.update({name: w[name].to(dtype)}))
    with pytest.raises(UserError, match=f"weight {name} in .* is stored as .*: quantised weights are not read"):
        open_model(checkpoint)


def empty(weights) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(0)


DAMAGED = {
    "an empty tensor": (lambda d: reweigh(d, empty), r"mlp.up_proj.weight in .* has shape \[0\], config.json asks for"),
    "a missing tensor": (lambda d: reweigh(d, lambda w: w.pop("model.norm.weight")), "lacks the weight model.norm.weight"),
    "an end beyond the vocabulary": (lambda d: configure(d, eos_token_id=[1, 99999]), "eos_token_id = 99999 in config.json lies outside"),
    "an end beyond the vocabulary in the settings": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": [1, 99999]}'),
        "eos_token_id = 99999 in generation_config.json lies outside",
    ),
    "a frequency that is text": (
        lambda d: configure(d, rope_parameters={"rope_type": "default", "rope_theta": "x"}), "rope_theta"),
    "no layers": (lambda d: configure(d, num_hidden_layers=-1), "num_hidden_layers = -1, no number above 0"),
    "broken generation settings": (lambda d: (d / "generation_config.json").write_text("{"), "generation_config.json is not valid JSON"),
    "generation settings that are a list": (lambda d: (d / "generation_config.json").write_text("[]"), "holds list, not an object"),
    "an index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"), "lacks the weight"),
}  # fmt: skip


@pytest.mark.parametrize("format", ["hf", "nemotron-nas", "gguf"])
@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named_and_nothing_is_written(what, format, puzzle, one_line_error, checkpoint, tmp_path):
    damage, wanted = DAMAGED[what]
    damage(checkpoint)
    done = puzzle("export", checkpoint, "--format", format, "--out", tmp_path / "out")
    one_line_error(done, wanted.split(".*")[-1].replace("\\", ""))
    assert not (tmp_path / "out").exists()


COMPANIONS = (
    "tokenizer.model.v3", "tekken.json", "qwen.tiktoken", "additional_chat_templates/tools.jinja", "vocab.json", "merges.txt",
    "special_tokens_map.json", "LICENSE.md",
)  # fmt: skip


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
def test_companions_come_along(format, checkpoint, tmp_path):
    for name in COMPANIONS:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(name)
    export(open_source(checkpoint), tmp_path / "out", format=format)
    assert all((tmp_path / "out" / name).read_text() == name for name in COMPANIONS)
    files = json.loads((tmp_path / "out/manifest.json").read_text())["files"]
    assert set(COMPANIONS) <= set(files)


@pytest.fixture
def bpe(checkpoint, parent) -> Path:
    """With the shipped parent's vocabulary as vocab.json and merges.txt, and no tokenizer.json."""
    model = json.loads((Path(parent) / "tokenizer.json").read_text())["model"]
    (checkpoint / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (checkpoint / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return checkpoint


def test_gguf_of_a_tokenizer_without_tokenizer_json(bpe):
    found = tokenizer_metadata(bpe, 4096, {})
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.merges"]
    (bpe / "vocab.json").unlink()
    (bpe / "merges.txt").unlink()
    (bpe / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="no tokenizer can be loaded from"):
        tokenizer_metadata(bpe, 4096, {})


def test_a_tokenizer_of_a_larger_vocabulary(bpe, corpus):
    """Its ids would be read beyond the embedding."""
    configure(bpe, vocab_size=60)
    with pytest.raises(UserError, match=r"gives token id \d+, but config.json says vocab_size 60"):
        load_tokens([str(corpus)], bpe, seq_len=16, num_train=2, num_validation=2)


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_a_hybrid_as_the_hub_has_it(prefix, tmp_path):
    """The pattern instead of a list, an infinity that is no JSON, tensors by either name; the fingerprint can be taken."""
    directory = write_tiny_parent("nemotron_h", tmp_path / "model")
    config, structure = json.loads((directory / "config.json").read_text()), open_model(directory).structure
    ids = torch.arange(2, 26)[None]
    wanted = load_model(directory)(ids)
    for name in ("layers_block_type", "layer_types", "time_step_limit"):
        config.pop(name, None)
    config |= {"hybrid_override_pattern": "M-*M-M", "num_hidden_layers": 6, "num_query_groups": 2, "rms_norm_eps": 1e-5}
    text = json.dumps(config | {"time_step_limit": [0.0, float("inf")]})
    assert "Infinity" in text
    (directory / "config.json").write_text(text)
    weights = load_file(directory / "model.safetensors")
    renamed = {name.replace("backbone.", prefix): tensor for name, tensor in weights.items()}
    save_file(renamed, directory / "model.safetensors", {"format": "pt"})
    opened = open_model(directory)
    assert opened.structure == structure
    assert torch.equal(load_model(opened)(ids), wanted)
    assert opened.checkpoint.fingerprint()
