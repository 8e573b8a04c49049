"""Parents in fp8, as others store them: read back as they are worth, or refused by name. Sizes fill no block."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8_parents import FLOAT, LAYOUTS, STATIC, block_wise, compressed, store_in_fp8
from puzzle.base.errors import UserError
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import export, open_source
from puzzle.parents.opened import open_model
from puzzle.runtime.model import load_model
from tiny_parents import write_tiny_parent

UP = "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(2, 26)[None]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_tiny_parent("llama", tmp_path_factory.mktemp("llama"))


def reweigh(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def configure(directory: Path, **values) -> None:
    config = json.loads((directory / "config.json").read_text()) | values
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_read_as_it_is_worth(layout, family, written, tmp_path):
    """To the bit, also where a stored matrix holds several of ours (Phi-3), or ours several stored ones (Qwen3-MoE); beside it the same values stored in float32."""
    parent = tmp_path / "parent"
    parent = shutil.copytree(written, parent) if family == "llama" else write_tiny_parent(family, parent)
    plain = shutil.copytree(parent, tmp_path / "plain")
    worth = store_in_fp8(parent, layout)
    save_file(worth, plain / "model.safetensors", {"format": "pt"})
    opened, beside = open_model(parent), open_model(plain)
    assert opened.structure == beside.structure
    for index, slot, _ in opened.structure:
        for name, tensor in beside.weights(index, slot).items():
            assert torch.equal(opened.weights(index, slot)[name].float(), tensor.float()), (index, slot, name)
    assert torch.equal(load_model(opened)(IDS), load_model(beside)(IDS))


@pytest.mark.parametrize(("format", "asked"), [("hf", None), ("nemotron-nas", None), ("hf", "fp8"), ("hf", "float32")])
def test_an_export_of_it(format, asked, written, tmp_path):
    """In bf16 unless something else is asked for."""
    parent = shutil.copytree(written, tmp_path / "parent")
    worth = store_in_fp8(parent, "odd blocks")
    engine = "vllm" if format == "nemotron-nas" else None  # which pads no widths
    done = export(open_source(parent), tmp_path / "child", format=format, engine=engine, dtype=asked)
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    stored = load_file(tmp_path / "child" / "model.safetensors")
    assert done.dtype == (asked or "bfloat16")
    assert config["dtype"] == ("float32" if asked == "float32" else "bfloat16")
    assert ("quantization_config" in config) == (asked == "fp8")
    if asked != "fp8":
        dtype = getattr(torch, asked or "bfloat16")
        assert {t.dtype for t in stored.values()} == {dtype}
        assert torch.equal(stored[UP], worth[UP].to(dtype))
    child = child_of_checkpoint(tmp_path / "child")
    assert child.num_parameters == open_model(parent).structure.num_parameters


BAD_CONFIGS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "a kind that is not read"),
    "int8": (compressed({"strategy": "channel", "type": "int"}), "weights.type = int"),
    "4 bits": (compressed({"strategy": "channel", "num_bits": 4}), "weights.num_bits = 4"),
    "groups": (compressed({"strategy": "group", "group_size": 32}), "weights.group_size = 32"),
    "a new strategy": (compressed({"strategy": "spiral"}), "weights.strategy = spiral"),
    "asymmetric": (compressed({"strategy": "channel", "symmetric": False}), "weights.symmetric = False"),
    "packed": (compressed({"strategy": "channel"}, format="pack-quantized"), "format = pack-quantized"),
    "rotated": (compressed({"strategy": "channel"}, transform_config={"a": 1}), "transform_config = .*'a'"),
    "no weights": ({**compressed({}), "config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g.weights = None"),
    "no block": ({**block_wise((128, 128)), "weight_block_size": None}, "weight_block_size = None"),
    "three sizes": ({**block_wise((128, 128)), "weight_block_size": [1, 2, 3]}, r"weight_block_size = \[1, 2, 3\]"),
    "e5m2": ({**block_wise((128, 128)), "fmt": "e5m2"}, "fmt = e5m2"),
    "an unknown word": ({**block_wise((128, 128)), "twist": 2}, "twist = 2"),
    "no section": (7, "quantization_config = 7"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_CONFIGS)
@pytest.mark.parametrize("own", [False, True], ids=["parent", "child"])
def test_what_the_config_asks_for_is_not_read(bad, own, written, tmp_path, puzzle, one_line_error):
    config, message = BAD_CONFIGS[bad]
    directory = shutil.copytree(written, tmp_path / "model")
    store_in_fp8(directory, "channel")
    if own:
        export(open_source(directory), tmp_path / "child", format="hf", dtype="fp8")
        directory = tmp_path / "child"
    configure(directory, quantization_config=config)
    with pytest.raises(UserError, match=message) as refused:
        open_model(directory)
    assert str(refused.value).startswith(f"{directory}: quantization_config")
    one_line_error(puzzle("export", directory, "--out", tmp_path / "out"), "quantization_config", str(directory))
    assert not (tmp_path / "out").exists()


def drop(name):
    return lambda w: w.pop(name)


def put(name, value):
    return lambda w: w.update({name: value(w[name])})


BAD_TENSORS = {
    "no scales": ("128 x 128", drop(f"{UP}_scale_inv"), f"{UP} is stored as F8_E4M3 without its scales {UP}_scale_inv"),
    "scales of another layout": (
        "128 x 128", lambda w: w.update({f"{UP}_scale": w.pop(f"{UP}_scale_inv")}), "without its scales"),
    "too few scales": ("odd blocks", put(f"{UP}_scale_inv", lambda s: s[1:].clone()), r"have shape .* asks for \[\d+, \d+\]"),
    "a scale per row": ("tensor", put(f"{UP}_scale", lambda s: torch.ones(3, 1)), r"have shape \[3, 1\].* asks for \[1\]"),
    "scales as powers": (
        "128 x 128", put(f"{UP}_scale_inv", lambda s: s.to(torch.float8_e8m0fnu)), "stored as F8_E8M0, which is not read"),
    "int8": ("channel", put(UP, lambda w: w.float().to(torch.int8)), "is stored as I8: quantised weights are not read"),
    "e5m2": ("channel", put(UP, lambda w: w.float().to(torch.float8_e5m2)), "is stored as F8_E5M2: quantised weights"),
    "a norm": (
        "channel", put("model.norm.weight", lambda w: w.to(torch.float8_e4m3fn)), "matrices alone are read so"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_what_the_tensors_are_is_not_read(bad, written, tmp_path):
    layout, change, message = BAD_TENSORS[bad]
    directory = shutil.copytree(written, tmp_path / "model")
    store_in_fp8(directory, layout)
    reweigh(directory, change)
    with pytest.raises(UserError, match=message):
        open_model(directory)


@pytest.mark.parametrize("where", [UP, f"{UP}_scale"])
def test_nan(where, written, tmp_path):
    """In a weight (fp8 has no infinity) or a scale: said when it is read, as of every weight."""
    directory = shutil.copytree(written, tmp_path / "model")
    store_in_fp8(directory, "channel")
    reweigh(directory, put(where, lambda w: torch.full_like(w.float(), float("nan")).to(w.dtype)))
    with pytest.raises(UserError, match=f"weight {UP} in .* has .* NaN or infinite values"):
        open_model(directory).check()


def test_fp8_in_the_config_alone(written, tmp_path):
    directory = shutil.copytree(written, tmp_path / "model")
    configure(directory, quantization_config=block_wise((128, 128)))
    with pytest.raises(UserError, match="says fp8, and no weight is stored as F8_E4M3"):
        open_model(directory)


def test_a_cache_in_fp8_changes_no_weight(written, tmp_path):
    """Nor do its scales, which are left unread."""
    directory = shutil.copytree(written, tmp_path / "model")
    configure(directory, quantization_config=compressed({}, config_groups={}, format="dense", kv_cache_scheme=FLOAT))
    reweigh(directory, lambda w: w.update({"model.layers.0.self_attn.k_scale": torch.ones(1)}))
    assert torch.equal(load_model(directory)(IDS), load_model(written)(IDS))
    store_in_fp8(directory, "static activations")
    configure(directory, quantization_config=LAYOUTS["static activations"][0] | {"kv_cache_scheme": STATIC})
    open_model(directory).check()


def test_the_whole_road(parent, corpus, build_options, tmp_path, puzzle):
    """Library, solution, export in bf16 and fp8, healing and evaluation of a parent that is in fp8."""
    source = shutil.copytree(parent, tmp_path / "parent")
    store_in_fp8(source, "odd blocks")
    lib, child = tmp_path / "lib", tmp_path / "child"
    limit = ("--gpu", "cpu", "--params", "0.8x", "--throughput", "0.1x", "--input-len", 16, "--output-len", 16)
    for words in (
        ("build-library", source, "--data", corpus, "--out", lib, *build_options, "--attention", "kv1", "--ffn", "0.5"),
        ("profile", lib, "--gpu", "cpu", "--batches", "1,4", "--prefill", "16", "--contexts", "16,32", "--seconds", 0.005, "--rounds", 1),
        ("solve", lib, *limit, "--out", tmp_path / "solution"),
        ("export", lib, tmp_path / "solution", "--out", child),
        ("export", lib, tmp_path / "solution", "--dtype", "fp8", "--out", tmp_path / "child-fp8"),
        ("heal", tmp_path / "child-fp8", "--teacher", source, "--data", corpus, "--tokens", 128, "--validation-sequences", 2, "--batch-size", 2, "--seq-len", 32, "--out", tmp_path / "healed"),
    ):  # fmt: skip
        done = puzzle(*words)
        assert done.exit_code == 0, (words, done.output)
    kl = {}
    for name in ("child", "child-fp8", "healed"):
        done = puzzle("evaluate", source, tmp_path / name, "--data", corpus, "--sequences", 8, "--seq-len", 64, "--no-speed", "--json")  # fmt: skip
        assert done.exit_code == 0, done.output
        kl[name] = json.loads(done.stdout)["child"]["kl"]
    assert kl["child"] > 0
    assert abs(kl["child-fp8"] - kl["child"]) < 0.1 * kl["child"] + 0.01
    for name in ("child", "healed"):
        assert {t.dtype for t in load_file(tmp_path / name / "model.safetensors").values()} == {torch.bfloat16}
