"""gpt-oss: experts in MXFP4 against transformers' own reader, and what of a checkpoint is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations import mxfp4 as theirs

from puzzle.base.errors import UserError
from puzzle.export.write import export, open_source
from puzzle.parents import mxfp4
from puzzle.parents.known import known_structure
from puzzle.parents.opened import open_model, structure_of
from puzzle.runtime.fast import FastRuntime
from puzzle.runtime.model import load_model
from puzzle.runtime.plain import PlainRuntime
from tiny_parents import write_tiny_parent

IDS = torch.randint(2, 384, (2, 41), generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
CONVERT = getattr(theirs, "_convert_moe_packed_tensors", theirs.convert_moe_packed_tensors)
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """In bf16, of values that MXFP4 has, and beside it the same packed."""
    root = tmp_path_factory.mktemp("gpt_oss")
    directory = write_tiny_parent("gpt_oss", root / "packed", **SIZES)
    weights = {n: t.bfloat16() for n, t in load_file(directory / "model.safetensors").items()}
    plain, packed, generator = dict(weights), dict(weights), torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).to(torch.uint8)
            scales = torch.randint(121, 125, blocks.shape[:-1], generator=generator).to(torch.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            del packed[name]
            plain[name] = CONVERT(blocks, scales)
    shutil.copytree(directory, root / "plain")
    save_file(plain, root / "plain" / "model.safetensors", {"format": "pt"})
    save_file(packed, directory / "model.safetensors", {"format": "pt"})
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    configure(directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    return root


def configure(directory: Path, **values) -> None:
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))


def test_dequantised_as_transformers_does():
    """Every pair of values beside every scale that is a number."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 255, -1, -1).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(2, -1, 16).contiguous()
    found = mxfp4.dequantised(blocks, scales)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.transpose(1, 2), CONVERT(blocks, scales))


@torch.no_grad()
def test_experts_in_mxfp4(written, tmp_path):
    """Bit for bit those that transformers makes in bf16; logits, tokens of both runtimes, and an export in bf16."""
    packed, plain = open_model(written / "packed"), open_model(written / "plain")
    packed.check()
    assert packed.structure == plain.structure
    for index, slot, _ in packed.structure:
        for name, tensor in plain.weights(index, slot).items():
            found = packed.weights(index, slot)[name]
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, tensor), (index, slot, name)
    options = {"dtype": torch.float32, "quantization_config": Mxfp4Config(dequantize=True)}
    reference = AutoModelForCausalLM.from_pretrained(
        written / "packed", **options
    ).float()  # 5.14 dequantises to bf16 alone
    ours = load_model(packed)
    assert (ours(IDS) - reference(IDS).logits).abs().max() <= 1e-4
    done = export(open_source(written / "packed"), tmp_path / "child")
    assert done.dtype == "bfloat16"
    assert {t.dtype for t in load_file(done.out / "model.safetensors").values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((done.out / "config.json").read_text())
    child = AutoModelForCausalLM.from_pretrained(done.out, dtype=torch.float32, trust_remote_code=True)
    assert (child(IDS).logits - reference(IDS).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("slice SOURCE --depth 1 --data CORPUS --out OUT", "is in MXFP4: slice the checkpoint in bf16"),
        ("grow SOURCE --experts 2 --out OUT", "is in MXFP4: grow the checkpoint in bf16"),
        ("serve-check SOURCE --engine hf", "is in MXFP4: an engine rounds"),
        ("bench SOURCE --engine vllm --gpu cpu --input-len 8 --output-len 8", "is in MXFP4, which no price is of"),
    ],
)
def test_what_needs_whole_weights_names_mxfp4(asked, message, written, corpus, tmp_path, puzzle, one_line_error):
    words = {"SOURCE": written / "packed", "CORPUS": corpus, "OUT": tmp_path / "out"}
    one_line_error(puzzle(*(words.get(word, word) for word in asked.split())), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [1, 5, 41])
def test_same_tokens_on_our_kernels(written, length):
    """Of heads of 10 channels, windows of 7, and sinks."""
    model = load_model(written / "plain")
    want = PlainRuntime(model, 2, length + 20).generate(IDS[:, :length], 20)
    assert torch.equal(FastRuntime(model, 2, length + 20).generate(IDS[:, :length], 20), want)


def damage(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("source", "config", "change", "message"),
    [
        ("packed", {}, lambda w: w.pop(f"{GATE_UP}_scales"), "gate_up_proj_blocks is stored as U8 without its scales"),
        ("packed", {}, lambda w: w.update({f"{GATE_UP}_scales": w[f"{GATE_UP}_scales"][:, :, :1].clone()}),
         r"gate_up_proj_scales are U8 of shape \[5, 192, 1\], and .* asks for U8 of \[5, 192, 2\]"),
        ("packed", {}, lambda w: w.update({f"{GATE_UP}_blocks": w[f"{GATE_UP}_blocks"][:, 1:].clone()}), "do not belong together"),
        ("packed", {}, lambda w: w[f"{GATE_UP}_scales"][0, 3].fill_(255), "gate_up_proj_blocks in .* has [0-9]+ NaN or infinite"),
        ("packed", {"quantization_config": None}, None, "gate_up_proj_blocks .* is stored as U8: quantised weights are not read"),
        ("packed", {"quantization_config": {"quant_method": "mxfp4", "twist": 2}}, None, "quantization_config.twist = 2"),
        ("packed", {"intermediate_size": 64}, None, r"gate_up_proj_blocks .* has shape \[5, 192, 2, 16\]"),
        ("plain", {"quantization_config": {"quant_method": "mxfp4"}}, None, "says mxfp4, and no experts are stored so"),
        ("plain", {}, lambda w: w.pop("model.layers.2.self_attn.sinks"), "lacks the weight model.layers.2.self_attn.sinks"),
        ("plain", {"swiglu_limit": 5.0}, None, "swiglu_limit = 5.0 in config.json is not supported for gpt_oss: 7.0 is"),
        ("plain", {"hidden_act": "gelu"}, None, "hidden_act = 'gelu' in config.json is not supported for gpt_oss"),
    ],
)  # fmt: skip
def test_refusals(source, config, change, message, written, tmp_path):
    directory = shutil.copytree(written / source, tmp_path / "model")
    configure(directory, **config)
    if change is not None:
        damage(directory, change)
    with pytest.raises(UserError, match=message) as refused:
        open_model(directory).check()
    assert "\n" not in str(refused.value)


PUBLISHED = {  # config.json of gpt-oss-20b, but for its lists and tokens
    "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
                     "truncate": False},
    "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip


def test_the_published_config_is_the_known_structure(tmp_path):
    assert structure_of(PUBLISHED, tmp_path) == known_structure("gpt-oss-20b")


@pytest.mark.parametrize(("size", "total", "active"), [("20b", 20.91, 3.61), ("120b", 116.83, 5.13)])
def test_the_published_sizes(size, total, active):
    """In 10⁹, of the model card, which counts one of embedding and head as active. A window keeps 128 tokens."""
    structure = known_structure(f"gpt-oss-{size}")
    idle = sum(b.num_parameters - b.active_parameters() for _, _, b in structure)
    used = structure.num_parameters - idle - structure.vocab_size * structure.hidden_size
    assert (round(structure.num_parameters / 1e9, 2), round(used / 1e9, 2)) == (total, active)
    held = [layer["attention"].state().num_bytes(100_000, "bf16") for layer in structure.layers]
    assert held == [2 * 2 * 8 * 64 * n for n in (128, 100_000)] * (structure.num_layers // 2)
