"""`--engine NAME==VERSION`: a vLLM that answers wrongly where layers differ in KV heads gets equal ones, exactly; exports say who serves."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from puzzle.base.errors import UserError
from puzzle.export.engines import ENGINES, ExportOptions, engine_named, release
from puzzle.export.hf import write_hf
from puzzle.export.lower import lower
from puzzle.parents.opened import open_model
from puzzle.run.recipe import _exports
from puzzle.runtime.model import load_model
from puzzle.serving.vllm_plugin import READ_AGAINST

BEFORE = "layers differ in KV heads (1, 2, 4): on a GPU it takes vllm >= 0.29"
REPEATED = "layers 1, 2: KV heads repeated, so that all layers have as many (+81,920 parameters, KV cache 2,816 to 4,096 bytes per token)"


@pytest.fixture
def child(tiny, tmp_path):
    """4, 1, 2 and 4 KV heads, in float32."""
    write_hf(tiny.tiny_child("kv-heads"), tmp_path / "child", card="")
    return tmp_path / "child"


@pytest.mark.parametrize(
    ("engine", "equal"),
    [
        ("vllm", False), ("vllm==0.18", True), ("vllm==0.26", True), ("vllm==0.28.1", True), ("vllm==0.28.1+cu130", True),
        ("vllm==0.29", False), ("vllm==0.29.0.post1", False), ("vllm==0.32.1", False), ("sglang", True),
    ],
)  # fmt: skip
def test_kv_heads_that_an_engine_gets_wrong_are_repeated(engine, equal, child, tmp_path, puzzle, one_line_error):
    done = puzzle("export", child, "--engine", engine, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    told = " ".join(done.stderr.split())
    assert (f"lowered for {engine}: equal-kv-heads: {REPEATED}" in told) == equal
    assert (BEFORE in told) == (engine == "vllm")
    card = (tmp_path / "out/README.md").read_text()
    assert ("Layers differ in KV heads (1, 2, 4)" in card) == (not equal)
    assert ("Read against the sources of" in card) == equal
    blocks = json.loads((tmp_path / "out/config.json").read_text())["block_configs"]
    assert len({block["attention"]["n_heads_in_group"] for block in blocks}) == (1 if equal else 3)
    ids = torch.arange(2, 60)[None]
    want, found = load_model(child)(ids), load_model(tmp_path / "out")(ids)
    assert (found - want).abs().max() < 1e-5 * want.std()


def test_biases_and_scales_are_repeated(tiny, child_logits, tmp_path, puzzle):
    """q, k and v with biases in float64; and in fp8, where a repeated row has its row's scale."""
    layers = ((tiny.kv(2), tiny.FFN), (tiny.kv(1), tiny.FFN))
    biased = tiny.build("biased", tiny.Tiny(layers=layers).but({"qkv_bias": True}))
    lowered, done = lower(biased, "vllm==0.26", "nemotron-nas")
    assert [item.name for item in done] == ["equal-kv-heads"]
    assert lowered.kv_heads == [2]
    ids = torch.arange(2, 40)[None]
    assert (child_logits(lowered, ids) - child_logits(biased, ids)).abs().max() < 1e-9
    write_hf(replace(biased, dtype=torch.float32), tmp_path / "child", card="")
    for engine, out in (("vllm", "mixed"), ("vllm==0.26", "equal")):
        done = puzzle("export", tmp_path / "child", "--engine", engine, "--dtype", "fp8", "--out", tmp_path / out)
        assert done.exit_code == 0, done.output
    mixed, equal = (load_file(tmp_path / out / "model.safetensors") for out in ("mixed", "equal"))
    for name in (
        f"model.layers.1.self_attn.{letter}_proj.{end}" for letter in "kv" for end in ("weight", "weight_scale", "bias")
    ):
        assert len(equal[name]) == 2 * len(mixed[name]) == 64
        assert torch.equal(equal[name].float(), mixed[name].float().repeat(2, *[1] * (mixed[name].ndim - 1))), name
    structure = open_model(tmp_path / "equal").structure
    assert [layer["attention"].num_key_value_heads for layer in structure.layers] == [2, 2]


@pytest.mark.parametrize("engine", ["vllm", "vllm==0.26"])
def test_equal_kv_heads_are_left_alone(engine, tiny, tmp_path, puzzle):
    write_hf(tiny.build("plain", tiny.Tiny(layers=(tiny.BLOCK,) * 2)), tmp_path / "child", card="")
    done = puzzle("export", tmp_path / "child", "--engine", engine, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "KV heads" not in done.output
    assert "Read against the sources of vllm 0.18 to 0.32, which serve it." in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("vlm==0.26", "unknown engine 'vlm': did you mean 'vllm'?"),
        ("vllm==0.17.1", "--engine vllm==0.17.1: what vllm takes was read in 0.18 to 0.32 alone: name such a version, or none"),
        ("vllm==0.33", "read in 0.18 to 0.32 alone"),
        ("vllm==1.0", "read in 0.18 to 0.32 alone"),
        ("mlx==0.31", "--engine mlx==0.31: what mlx takes was read in 0.32.2 alone"),
        ("vllm==0.29.0rc1", "--engine vllm==0.29.0rc1: '0.29.0rc1' is no release: write it as in vllm==0.32"),
        ("vllm==", "'' is no release"),
        ("vllm==26", "'26' is no release"),
        ("vllm=0.26", "unknown engine 'vllm=0.26'"),
        ("llama.cpp==0.3", "--engine llama.cpp==0.3: versions of llama.cpp are not told apart: write --engine llama.cpp"),
    ],
)  # fmt: skip
def test_versions_that_are_not_known(engine, message, child, tmp_path, puzzle, one_line_error):
    one_line_error(puzzle("export", child, "--engine", engine, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="engine"):
        _exports({"engine": engine}, tmp_path)


def test_the_table():
    vllm, (oldest, newest) = ENGINES["vllm"], READ_AGAINST
    assert vllm.plug_in == ".".join(map(str, oldest))
    assert vllm.read is not None
    assert vllm.read[1] == ".".join(map(str, newest))
    assert engine_named("vllm") is vllm
    assert engine_named("vllm==0.30") == vllm
    assert engine_named("vllm==0.26") == replace(vllm, equal_kv_heads=True)
    assert release("0.26.1+cu130") == (0, 26, 1)
    (one,) = _exports("vllm==0.26", None)
    assert (one.engine, one.name) == ("vllm==0.26", "vllm-0.26")


def test_every_card_says_which_vllm_serves(child, tmp_path, puzzle):
    for words, told in (
        (["--format", "nemotron-nas"], "Layers differ in KV heads (1, 2, 4)"),
        ([], "vLLM 0.26 to 0.32, through puzzle's plug-in"),
    ):
        done = puzzle("export", child, *words, "--out", tmp_path / "out", "--force")
        assert done.exit_code == 0, done.output
        assert (BEFORE in " ".join(done.output.split())) == bool(words)
        assert told in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ({}, True),
        ({"format": "hf"}, True),
        ({"format": "hf", "licence": "mit"}, False),
        ({"format": "hf", "dtype": "float32"}, False),
        ({"format": "nemotron-nas"}, False),
        ({"engine": "mlx"}, False),
        ({"engine": "vllm==0.26"}, False),
        ({"format": "gguf", "dtype": "q8_0"}, False),
    ],
)
def test_what_a_run_has_already(said, same):
    """An export that asks for nothing more is the run's own child; any other one is written."""
    assert ExportOptions(**said).is_the_child is same
