"""The vLLM plug-in: what can be said without vLLM, and the engine itself where `.engines/vllm` is set up with puzzle in it."""

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig

from puzzle.base.errors import UserError
from puzzle.blocklib.plain.part import loaded
from puzzle.blocklib.sub_block import MissingFace, ParentBlock, kinds, parse_key
from puzzle.blocklib.variant import variant_of
from puzzle.export import write
from puzzle.export.hf import write_hf
from puzzle.export.sources import child_of_checkpoint
from puzzle.export.write import Source, export, open_source
from puzzle.parents.opened import open_model
from puzzle.serving import vllm_plugin
from puzzle.serving.check import EngineFailed, run_engine, serve_check
from serving_environments import python_of
from tiny_children import CHILDREN, FAMILIES, LOW_RANK, MIXED, WITH_FORMATS, build, tiny_child, write_tiny_child
from tiny_parents import write_tiny_parent

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registered(monkeypatch):
    """The plug-in registered in this process, with a vLLM that only takes notes: {architecture: what vLLM was told of it}."""
    told: dict[str, list] = {"models": [], "settings": {}}
    registry = SimpleNamespace(register_model=lambda *model: told["models"].append(model))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry, __version__="0.32.0+cpu"))
    config = SimpleNamespace(MODELS_CONFIG_MAP=told["settings"])
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", config)
    vllm_plugin.register()
    vllm_plugin.register()
    yield told
    CONFIG_MAPPING._extra_content.pop("puzzle")


def test_it_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"puzzle": "puzzle.serving.vllm_plugin:register"}
    assert project["optional-dependencies"]["vllm"] == ["vllm>=0.26"]  # the oldest of READ_AGAINST
    assert vllm_plugin.READ_AGAINST[0] == (0, 26)


@pytest.mark.parametrize("name", CHILDREN | LOW_RANK | FAMILIES)
def test_a_child_is_read_without_its_code(registered, tmp_path, name):
    """What vLLM sizes by: the most KV heads, no window for all, no RoPE that stretches the context; the layers as they are."""
    path = write_tiny_child(name, tmp_path / name)
    (path / "modeling_puzzle.py").write_text("raise RuntimeError('code of the checkpoint')\n")
    meant = open_model(path).structure
    for trusted in (False, True):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
        assert type(config) is vllm_plugin.ServedConfig
        assert config.structure() == meant
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (4, 32, 512)
    assert not hasattr(config, "sliding_window")
    assert config.rope_parameters["rope_type"] == "default"
    again = vllm_plugin.ServedConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.structure() == meant


def test_vllm_is_told(registered, tmp_path):
    names = ("PuzzleForCausalLM", "PuzzleHybridForCausalLM")
    assert set(registered["models"]) == {(name, f"puzzle.serving.vllm_model:{name}") for name in names}
    settings = registered["settings"]["PuzzleForCausalLM"]
    for layers, cached in ((MIXED.layers, True), ((MIXED.layers[0], MIXED.layers[3]), False)):
        write_hf(build("settings", replace(MIXED, layers=layers)), tmp_path / "child", "", force=True)
        model_config = SimpleNamespace(hf_config=AutoConfig.from_pretrained(tmp_path / "child"))
        engine = SimpleNamespace(model_config=model_config, cache_config=SimpleNamespace(enable_prefix_caching=True))
        settings.verify_and_update_model_config(model_config)
        settings.verify_and_update_config(engine)
        assert engine.cache_config.enable_prefix_caching is cached
    for name, value in (("num_hidden_layers", 1), ("rope_parameters", {"rope_type": "yarn"}), ("rms_norm_eps", 1e-3)):
        before = getattr(model_config.hf_config, name)
        setattr(model_config.hf_config, name, value)
        with pytest.raises(ValueError, match=f"^{name} .* where config.json has .*: a child takes no hf-overrides"):
            settings.verify_and_update_model_config(model_config)
        setattr(model_config.hf_config, name, before)


def hybrid(out: Path, *changes) -> Path:
    """A child of blocks M-*M-M in `--format hf`, with sizes that vLLM's CPU build takes. changes: of `Source` layers."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_attention_heads": 4, "vocab_size": 4096}
    sizes |= {
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 64,
        "max_position_embeddings": 512,
    }
    child = child_of_checkpoint(write_tiny_parent("nemotron_h", out.with_name("parent"), **sizes, chunk_size=64))
    layers = list(child.layers)
    for index, slot, name in changes:
        variant = variant_of(layers[index].slots[slot], name)
        block = ParentBlock(sub_block=layers[index].slots[slot], weights=layers[index].read(slot))
        with torch.no_grad():
            block.statistics = loaded(block.sub_block, block.weights).calibrate([torch.randn(1, 40, 128)])
        weights = {n: t.contiguous() for n, t in variant.initialise(block).items()}
        layers[index] = layers[index].put(slot, variant.sub_block, lambda weights=weights: dict(weights))
    write_hf(replace(child, layers=tuple(layers)), out, "")
    return out


def test_a_hybrid_is_another_architecture(registered, tmp_path):
    """vLLM is told which layers keep states, the chunk, and the dtype of states unless the user says one."""
    path = hybrid(tmp_path / "child", (0, "attention", "heads4"))
    config = AutoConfig.from_pretrained(path)
    assert config.architectures == ["PuzzleHybridForCausalLM"]
    assert config.layers_block_type == ["mamba", "mlp", "attention", "mamba", "mlp", "mamba"]
    assert config.chunk_size == 64
    other = json.loads((path / "config.json").read_text())
    other["per_layer_config"]["3"]["mamba"]["chunk_size"] = 96  # which no kernel takes, and changes no result
    assert vllm_plugin.ServedConfig.from_dict(other).chunk_size == 64
    assert config.structure() == open_model(path).structure
    settings, model_config = registered["settings"]["PuzzleHybridForCausalLM"], SimpleNamespace(hf_config=config)
    settings.verify_and_update_model_config(model_config)
    for asked, found in (("auto", "float32"), ("bfloat16", "bfloat16")):
        engine = SimpleNamespace(model_config=model_config, cache_config=SimpleNamespace(mamba_ssm_cache_dtype=asked))
        settings.verify_and_update_config(engine)
        assert engine.cache_config.mamba_ssm_cache_dtype == found
    shutil.rmtree(tmp_path / "parent")
    model_config.hf_config = AutoConfig.from_pretrained(hybrid(tmp_path / "other", (2, "attention", "none")))
    with pytest.raises(ValueError, match="this child has mamba2 and no attention"):
        settings.verify_and_update_model_config(model_config)
    sizes = {"num_key_heads": 2, "key_dim": 64, "num_value_heads": 4, "value_dim": 64}
    other["per_layer_config"]["3"] = {"gated_delta": sizes, "skip": ["mlp"]}
    model_config.hf_config = vllm_plugin.ServedConfig.from_dict(other)
    with pytest.raises(ValueError, match="this child has gated_delta and mamba2: vLLM has one kind"):
        settings.verify_and_update_model_config(model_config)
    other["per_layer_config"]["3"]["gated_delta"] = sizes | {"gate": False}
    with pytest.raises(MissingFace, match="'gated_delta' have no face in vLLM without a gate"):
        vllm_plugin.ServedConfig.from_dict(other)


def test_a_child_that_is_not_understood(registered, tmp_path):
    path = write_tiny_child("window", tmp_path / "window")
    config = json.loads((path / "config.json").read_text())
    config["per_layer_config"]["1"]["sinks"] = 4
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"per_layer_config\[1\] has 'sinks', which is not understood"):
        AutoConfig.from_pretrained(path)


@pytest.mark.parametrize(("version", "found"), [("0.26.0", (0, 26)), ("0.32.1rc1.dev3+cpu", (0, 32)), ("1.4", (1, 4))])
def test_versions(version, found, caplog):
    assert vllm_plugin.check_version(version) == found
    assert ("was read against vLLM 0.26 to 0.32" in caplog.text) is (found > (0, 32))


@pytest.mark.parametrize("version", ["0.25.1", "0.9", "dev"])
def test_versions_that_are_too_old(version):
    with pytest.raises(ValueError, match=f"^vLLM {version}: puzzle's plug-in serves children in vLLM 0.26 to 0.32: "):
        vllm_plugin.check_version(version)


@pytest.mark.parametrize("name", CHILDREN | LOW_RANK | FAMILIES)
def test_tensors_that_are_wanted(name):
    child = tiny_child(name)
    written = {name for name, _ in child.tensors()}
    wanted = vllm_plugin.wanted_tensors(child.structure, child.tied)
    assert wanted == written
    lost = "model.layers.1.mlp.down_proj.weight"
    assert vllm_plugin.missing_tensors(wanted | {lost}, wanted - {lost}) == {lost}
    assert not vllm_plugin.missing_tensors(wanted | {lost}, wanted - {lost} | {f"{lost}_packed"})


def test_every_kind_has_a_face():
    for name, kind in kinds().items():
        assert (kind.on_vllm or "").partition(":")[0] == ("" if name == "none" else f"puzzle.blocklib.vllm.{name}")
    assert parse_key("none").in_vllm(None) is None
    faceless = type("Faceless", (kinds()["swiglu"],), {"kind": "faceless", "on_vllm": None})
    with pytest.raises(MissingFace, match="sub-blocks of kind 'faceless' have no face in vLLM"):
        faceless(hidden_size=4, intermediate_size=8).in_vllm(None)


# -- in the engine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    """The interpreter of an environment that has vLLM and puzzle."""
    python, code = python_of("vllm"), "import puzzle.serving.vllm_plugin, vllm"
    if not python.is_file() or subprocess.run([str(python), "-c", code], capture_output=True).returncode:
        pytest.skip("vLLM is not set up: python benchmarks/lib/serving_environments.py vllm")
    return python


def test_the_engine_computes_the_same_of_a_hybrid(engine, tmp_path):
    """Layers of Mamba-2 that differ, fewer KV heads, half an FFN."""
    changes = ((0, "attention", "heads4"), (2, "attention", "kv1"), (3, "attention", "dim16"), (1, "ffn", "0.5"))
    check = serve_check(hybrid(tmp_path / "child", *changes), "vllm", python=engine, num_tokens=16)
    assert check.equal, check.verdict
    assert check.held.equal, check.held.verdict


@pytest.mark.parametrize("name", ["qwen3-moe, alike", "gpt-oss, alike", "nemotron-h, dense", "mamba in a llama"])
def test_the_engine_reads_stock_formats(engine, tmp_path, name):
    """With its own code, the same as our child before it was written so; states and pages are as we say."""
    reference, (format, *_) = write_tiny_child(name, tmp_path / "child"), WITH_FORMATS[name].formats
    source = Source(child=tiny_child(name, tmp_path / "tokenizer"), solved=None, facts=None, measured=None)
    out = export(source, tmp_path / "out", format=format, engine="vllm").out
    check = serve_check(out, "vllm", python=engine, reference=reference, num_tokens=16)
    assert check.equal, check.verdict
    assert check.held.equal, check.held.verdict


SCALES = """
import os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
import vllm
engine = vllm.LLM(sys.argv[1], enforce_eager=True, max_model_len=64, max_num_seqs=2, dtype="bfloat16", skip_tokenizer_init=True)
def look(model):
    return [(m.kv_cache_dtype, float(m._k_scale), float(m._v_scale)) for m in model.modules() if hasattr(m, "_k_scale")]
print("found", engine.apply_model(look)[0])
"""


@pytest.mark.parametrize(
    ("name", "format", "attends"),
    [
        ("qwen3_moe", "qwen3-moe", (0, 1, 2, 3)),
        ("granitemoehybrid, Mamba-2 and dense FFNs", "granitemoehybrid", (1,)),
        ("granitemoehybrid, attention alone", "granitemoehybrid", (0, 1, 2, 3)),
    ],
)
def test_the_engine_reads_scales_of_the_cache(engine, tmp_path, monkeypatch, name, format, attends):
    """In stock formats, whose loaders are its own: each layer's, and no word of them is lost."""
    scales = {layer: (0.25 * (layer + 1), 0.5 * (layer + 1)) for layer in attends}
    monkeypatch.setattr(write, "calibrate", lambda *given: scales)
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    if format == "granitemoehybrid":
        sizes |= {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16}
    source = open_source(write_tiny_parent(name, tmp_path / "parent", **sizes))
    out = export(source, tmp_path / "out", format=format, engine="vllm", kv_dtype="fp8", data=["x"]).out
    assert "transformers" not in (out / "README.md").read_text().partition("vLLM ≥ 0.32")[2]
    done = subprocess.run([str(engine), "-c", SCALES, str(out)], capture_output=True, text=True)
    assert f"found {[('fp8', *scales[layer]) for layer in attends]}" in done.stdout, done.stderr[-2000:]


def test_the_engine_computes_the_same_of_gated_delta(engine, tmp_path):
    """In bf16, which its kernels for CPUs take alone: as near to our float32 as our own bf16 is."""
    check = serve_check(write_tiny_child("gated delta, all sizes", tmp_path / "child"), "vllm", python=engine)
    assert check.batch.dtype == "bfloat16"
    assert check.equal, check.verdict
    assert check.held.equal, check.held.verdict


@pytest.mark.parametrize("name", ["empty-layers", "gemma3", "qwen3_moe", "gpt_oss"])
def test_the_engine_computes_the_same(engine, tmp_path, name):
    path = write_tiny_child(name, tmp_path / name)
    (path / "modeling_puzzle.py").unlink()  # which vLLM does not need
    check = serve_check(path, "vllm", python=engine, num_tokens=16)
    assert check.equal, check.verdict
    assert (check.batch.num_prompts, check.batch.same_texts) == (8, 8)


MENDED = """
import sys, types
class Builder:
    def __init__(self, kv_cache_spec, layers, config, device):
        self.num_heads_kv = 8  # of the whole model
sys.modules["vllm.v1.attention.backends.flash_attn"] = types.SimpleNamespace(FlashAttentionMetadataBuilder=Builder)
from puzzle.serving import vllm_model
for _ in range(2):
    vllm_model.plan_each_group_by_its_own_kv_heads()
assert [Builder(types.SimpleNamespace(num_kv_heads=n), [], None, device=None).num_heads_kv for n in (8, 2, 1)] == [8, 2, 1]
Attention = vllm_model.Attention = type("Attention", (vllm_model.nn.Module,), {})
model = Attention()
for name in (*vllm_model.PER_LAYER, "ROCM_AITER_FA"):
    model.attn_backend = types.SimpleNamespace(get_name=lambda: name)
    vllm_model.check_backends(model)
"""


def test_kv_heads_that_differ(engine):
    """FlashAttention of 0.26 to 0.28 is mended; a backend that may take the model-wide number is refused."""
    done = subprocess.run([str(engine), "-c", MENDED], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "ValueError: this child's layers differ in KV heads, which attention backend ROCM_AITER_FA may"
    )


@pytest.mark.parametrize(
    ("lost", "gained", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks model.layers.1.mlp.up_proj.weight \(1 tensors in all\)"),
        (
            None,
            "model.layers.1.mlp.up_proj.bias",
            "has model.layers.1.mlp.up_proj.bias, for which config.json has no place",
        ),
    ],
)
def test_the_engine_loads_all_or_nothing(engine, tmp_path, lost, gained, message):
    """vLLM's own loader looks away from half of a stacked matrix, and from a bias too many."""
    path = write_tiny_child("window", tmp_path / "child")
    tensors = load_file(path / "model.safetensors")
    changed = {name: tensor for name, tensor in tensors.items() if name != lost}
    changed |= {gained: tensors["model.layers.1.mlp.up_proj.weight"][:, 0].contiguous()} if gained else {}
    save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
    job = {
        "engine": "vllm",
        "path": str(path),
        "format": "hf",
        "prompt": [2, 3],
        "num_tokens": 4,
        "threads": 1,
        "text": None,
    }
    with pytest.raises(EngineFailed, match=message):
        run_engine(job, engine)
