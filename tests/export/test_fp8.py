"""`--dtype fp8` and `--kv-dtype fp8`: what is written, what it is worth, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fp8_parents import quantise
from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.data.packing import load_tokens
from puzzle.export import fp8
from puzzle.export.child import with_dtype
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import Source, export, open_source
from puzzle.parents.opened import open_model
from puzzle.run.recipe import read_recipe
from puzzle.runtime.model import load_model
from puzzle.serving.reference import find_export, load_reference

IDS = torch.randint(2, 60, (2, 40), generator=torch.Generator().manual_seed(0))


def source_of(child) -> Source:
    return Source(child=child, solved=None, facts=None, measured=None)


def as_it_is_worth(child):
    """Its matrices rounded to fp8 row by row, by the plain twin."""

    def rounded(read):
        def tensors():
            found = read()
            for name, value in found.items():
                if value.ndim == 2:
                    scale = value.float().abs().amax(1) / 448
                    scale[scale == 0] = 1
                    stored = (value.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
                    found[name] = stored.float() * scale[:, None]
                else:
                    found[name] = value.bfloat16()
            return found

        return tensors

    layers = [replace(one, reads={s: rounded(read) for s, read in one.reads.items()}) for one in child.layers]
    ends = with_dtype(child, torch.bfloat16)
    return replace(ends, layers=tuple(layers))


def test_logits_of_what_it_is_worth(name, tiny, tmp_path):
    """Of all twelve, in the default format and, lowered for vLLM, in nemotron-nas: those of the weights rounded by hand."""
    child = tiny.tiny_child(name)
    export(source_of(as_it_is_worth(child)), tmp_path / "worth", dtype="float32")
    wanted = load_model(tmp_path / "worth")(IDS)
    for format, engine in (("hf", None), ("nemotron-nas", "vllm"), ("nemotron-nas", "sglang")):
        try:
            done = export(source_of(child), tmp_path / f"{format}-{engine}", format=format, engine=engine, dtype="fp8")
        except UserError:
            assert engine == "sglang"  # windows, linear parts: as in every dtype
            continue
        for model in (load_model(done.out), load_reference(find_export(done.out))):
            assert (model(IDS) - wanted).abs().max() < 1e-4 * wanted.std()


def test_what_is_written(name, tiny, tmp_path):
    child = tiny.tiny_child(name)
    export(source_of(child), tmp_path / "child", dtype="fp8")
    config, stored = (
        json.loads((tmp_path / "child/config.json").read_text()),
        load_file(tmp_path / "child/model.safetensors"),
    )
    for key, value in stored.items():
        matrix = value.ndim == 2 and key.startswith("model.layers.") and not key.endswith("_scale")
        other = torch.float32 if key.endswith("_scale") else torch.bfloat16
        assert value.dtype == (torch.float8_e4m3fn if matrix else other), key
        if matrix:
            assert stored[f"{key}_scale"].shape == (len(value), 1)
            worth = value.float() * stored[f"{key}_scale"]
            assert (quantise(worth, (1, 10**9))[2] - worth).abs().max() < 1e-2 * worth.abs().max()
    assert len([key for key in stored if key.endswith("_scale")]) == len(
        [v for v in stored.values() if v.itemsize == 1]
    )
    assert config["dtype"] == "bfloat16"
    said = config["quantization_config"]
    group = said["config_groups"]["group_0"]
    assert (said["quant_method"], said["format"], said["ignore"]) == (
        "compressed-tensors",
        "float-quantized",
        ["lm_head"],
    )
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["weights"]["dynamic"]) == ("channel", False)
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    assert said["kv_cache_scheme"] is None
    card = (tmp_path / "child/README.md").read_text()
    assert "float8_e4m3fn with a scale per output channel" in card
    assert "compressed-tensors ≥ 0.15" in card
    assert "kv-cache-dtype" not in card


def test_again_in_fp8_is_the_same(parent, tmp_path):
    export(open_source(parent), tmp_path / "once", dtype="fp8")
    export(open_source(tmp_path / "once"), tmp_path / "twice", dtype="fp8")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    for name, value in once.items():
        if name.endswith("_scale"):
            assert ((value / twice[name] - 1).abs() < 2**-23).all(), name
        else:
            assert torch.equal(value.view(torch.uint8), twice[name].view(torch.uint8)), name
    assert child_of_checkpoint(tmp_path / "once").num_parameters == open_model(parent).structure.num_parameters


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
def test_in_transformers(format, parent, tmp_path):
    """With the package compressed-tensors the same logits; without it transformers names the package."""
    export(open_source(parent), tmp_path / "child", format=format, engine="vllm" if format == "nemotron-nas" else None, dtype="fp8")  # fmt: skip
    options = {"trust_remote_code": True, "dtype": torch.float32}
    try:
        import compressed_tensors  # noqa: F401
        from transformers import CompressedTensorsConfig
    except ImportError:
        with pytest.raises(ImportError, match=r"compressed.tensors"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "child", **options)
        return
    dense = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child", quantization_config=dense, **options)
    with torch.no_grad():
        theirs, ours = model(IDS).logits, load_model(tmp_path / "child")(IDS)
    assert (theirs - ours).abs().max() < 1e-5 * ours.std()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child", **options)  # activations rounded too
    with torch.no_grad():
        assert (model(IDS).logits - ours).abs().mean() < 0.3 * ours.std()


@pytest.mark.parametrize("dtype", [None, "fp8"])
def test_scales_of_the_cache(dtype, parent, corpus, tmp_path, puzzle):
    """Those of transformers' own cache on the same text."""
    words = ("--engine", "vllm", "--kv-dtype", "fp8", "--data", corpus, *(("--dtype", dtype) if dtype else ()))
    done = puzzle("export", parent, *words, "--out", tmp_path / "child", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kv_dtype"] == "fp8"
    stored = load_file(tmp_path / "child/model.safetensors")
    tokens = load_tokens([str(corpus)], parent, seq_len=256, num_train=fp8.SEQUENCES, num_validation=1).train.long()
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)(
            tokens, use_cache=True
        ).past_key_values
    for index, layer in enumerate(cache.layers):
        for letter, found in (("k", layer.keys), ("v", layer.values)):
            scale = stored[f"model.layers.{index}.self_attn.{letter}_scale"]
            assert (scale.shape, scale.dtype) == ((1,), torch.float32)
            assert abs(scale.item() * 448 / found.abs().max().item() - 1) < 1e-4
    said = json.loads((tmp_path / "child/config.json").read_text())["quantization_config"]
    assert said["kv_cache_scheme"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    assert said["config_groups"].keys() == ({"group_0"} if dtype else set())
    assert "vllm serve PATH --trust-remote-code --kv-cache-dtype fp8\n" in (tmp_path / "child/README.md").read_text()
    assert open_model(tmp_path / "child").structure.num_layers == 4  # scales of a cache are left unread


def test_scales_where_layers_were_rewritten(tiny, parent, corpus, tmp_path):
    """By the layer that they were measured in, whatever was dropped or put before it; 1 for attention that keeps zeros."""
    child = replace(tiny.tiny_child("no-attention-first"), tokenizer=parent, generation_config=None)
    scales = fp8.cache_scales(fp8.Walker(child, torch.randint(60, (2, 16)), torch.device("cpu"), torch.float32))
    assert scales.keys() == {layer.origin for layer in child.layers if isinstance(layer.attention, Gqa)} == {1, 2}
    export(source_of(child), tmp_path / "out", engine="vllm", dtype="fp8")
    lowered = child_of_checkpoint(tmp_path / "out")
    assert isinstance(lowered.layers[0].attention, Gqa)  # a zero one
    found = dict(fp8.cache_tensors(lowered, scales))
    assert [found[f"model.layers.{i}.self_attn.k_scale"].item() for i in range(3)] == pytest.approx([1.0, scales[1][0], scales[2][0]])  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "fp8", "--engine", "llama.cpp"], "--dtype fp8"),
        (["--dtype", "fp8", "--engine", "llama.cpp", "--format", "nemotron-nas"], "llama.cpp reads none of compressed-tensors: use --engine vllm or sglang"),
        (["--dtype", "fp8", "--engine", "mlx"], "mlx reads none of compressed-tensors"),
        (["--dtype", "fp8", "--engine", "tensorrt-llm"], "tensorrt-llm reads none of compressed-tensors"),
        (["--dtype", "fp8_e5m2"], "--dtype fp8_e5m2 with --format hf: did you mean 'fp8'"),
        (["--kv-dtype", "fp8", "--data", "x", "--engine", "mlx"], "--kv-dtype fp8: mlx reads none"),
        (["--kv-dtype", "int8", "--data", "x"], "--kv-dtype int8: fp8 is"),
        (["--kv-dtype", "fp8", "--data", "x", "--format", "qwen3-moe"], "--kv-dtype fp8 with --format qwen3-moe: its readers may not read the cache's scales: pass --engine vllm, of which 0.32 and newer do"),
        (["--kv-dtype", "fp8", "--data", "x", "--format", "qwen3-moe", "--engine", "vllm==0.31"], "--format qwen3-moe: vllm==0.31 may not read"),
        (["--kv-dtype", "fp8", "--data", "x", "--format", "granitemoehybrid", "--engine", "sglang"], "--format granitemoehybrid: sglang may not read"),
        (["--kv-dtype", "fp8", "--data", "x", "--format", "gpt-oss"], "--format gpt-oss has no scales of a cache here"),
        (["--kv-dtype", "fp8"], "--kv-dtype fp8: the cache's scales are calibrated on text: pass --data"),
        (["--dtype", "fp8", "--data", "x"], "--data is not used without --kv-dtype"),
        (["--dtype", "fp8", "--text-field", "x"], "--text-field is not used without --kv-dtype"),
        (["--kv-dtype", "fp8", "--data", "nowhere-to-be-found"], "nowhere-to-be-found"),
    ],
)  # fmt: skip
def test_refused(words, message, parent, tmp_path, puzzle, one_line_error):
    one_line_error(puzzle("export", parent, *words, "--out", tmp_path / "out"), message)
    assert not list(tmp_path.iterdir())


def test_serve_check_says_why_it_cannot(parent, tmp_path, puzzle, one_line_error):
    export(open_source(parent), tmp_path / "child", dtype="fp8")
    done = puzzle("serve-check", tmp_path / "child", "--engine", "hf")
    one_line_error(
        done, "is in fp8: an engine rounds its activations or cache as they come", "check the same child in bf16"
    )


def test_a_measurement_is_of_the_child_that_was_measured(parent, tmp_path):
    """An evaluation.json beside the child in bf16 does not go to its card in fp8."""
    found = {"loss": 1.0, "kl": 0.5, "kl_stderr": 0.1, "top1_agreement": 0.9, "num_parameters": 7}
    measured = {"child": found, "parent": found, "device": "cpu", "dtype": "float32", "num_tokens": 100}
    export(open_source(parent), tmp_path / "child", measured=measured)
    for dtype, told in ((None, True), ("fp8", False)):
        export(open_source(tmp_path / "child"), tmp_path / "again", dtype=dtype, force=True)
        assert ("## Measured" in (tmp_path / "again" / "README.md").read_text()) == told
        assert (tmp_path / "again" / "evaluation.json").is_file() == told


def test_no_tokenizer(tiny, corpus, tmp_path):
    child = replace(tiny.tiny_child("kv-heads"), tokenizer=None)
    with pytest.raises(UserError, match="`kv_dtype` fp8: kv-heads has no tokenizer"):
        export(source_of(child), tmp_path / "out", kv_dtype="fp8", data=[str(corpus)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite(bad, tiny, tmp_path):
    """A library's blocks are not looked at when they are read."""
    child = tiny.tiny_child("kv-heads")
    whole = child.layers[1].read("ffn")
    whole["up_proj.weight"][3, 4] = bad
    layers = (child.layers[0], child.layers[1].put("ffn", child.layers[1].ffn, lambda: dict(whole)), *child.layers[2:])
    with pytest.raises(UserError, match=r"weight model.layers.1.mlp.up_proj.weight has NaN or infinite values"):
        export(source_of(replace(child, layers=layers)), tmp_path / "out", dtype="fp8")
    assert not list(tmp_path.iterdir())


def test_a_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    exports = [{"format": "hf", "dtype": "fp8"}, {"engine": "vllm", "dtype": "fp8", "kv_dtype": "fp8"}]
    recipe.write_text(yaml.safe_dump({"parent": "p", "export": exports}))
    assert [one.name for one in read_recipe(recipe).export] == ["hf-fp8", "vllm-fp8-kv-fp8"]
    recipe.write_text(yaml.safe_dump({"parent": "p", "export": {"engine": "mlx", "dtype": "fp8"}}))
    with pytest.raises(UserError, match=r"export.dtype fp8: mlx reads none of compressed-tensors"):
        read_recipe(recipe)


def test_a_place_in_use_is_refused_before_anything_is_calibrated(
    own_library, puzzle, one_line_error, tmp_path, monkeypatch
):
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "mine").write_text("")
    monkeypatch.setattr("puzzle.export.write.calibrate", None)
    source = json.loads((own_library / "library.json").read_text())["parent"]["source"]
    words = ("--kv-dtype", "fp8", "--data", tmp_path, "--out", tmp_path / "child")
    one_line_error(puzzle("export", own_library / source, *words), "child is not empty")
