"""A child that was solved for several precisions: written as such, run as such, and refused where it cannot be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from puzzle.base.workload import Workload
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.none import NoOp
from puzzle.blocklib.plain.fp8 import rounded
from puzzle.choose.goal import GoalOptions
from puzzle.choose.problem import Request
from puzzle.choose.solve import open_costs, solve_library
from puzzle.export.write import export, open_source
from puzzle.library.assemble import open_child
from puzzle.library.manifest import Library
from puzzle.measure.architecture import Architecture, read_architecture, write_architecture
from puzzle.measure.measurable import of_checkpoint
from puzzle.parents.opened import open_model
from puzzle.runtime.interface import Fp8
from puzzle.runtime.model import load_model

IDS = torch.randint(2, 60, (2, 40), generator=torch.Generator().manual_seed(0))
FP8 = {(0, "attention"), (1, "ffn"), (3, "attention"), (3, "ffn")}  # layer 2 is in bf16 altogether


@pytest.fixture
def precise(own_library) -> Architecture:
    """Solved in one precision, for a child with something changed; some of its sub-blocks in fp8, as if chosen so."""
    library = Library.open(own_library)
    request = Request(work=Workload(input_len=16, output_len=16), goal=GoalOptions(throughput="1.1x").goal())
    solved = solve_library(library, open_costs(library, "cpu", None), request)
    space = library.spaces[1]
    layers = [
        {
            slot: replace(choice, variant="parent", sub_block=library.structure.layers[n][slot])
            for slot, choice in layer.items()
        }
        for n, layer in enumerate(solved.layers)
    ]
    layers[1]["attention"] = replace(layers[1]["attention"], variant="linear", sub_block=space["attention"]["linear"])
    layers[2]["ffn"] = replace(layers[2]["ffn"], variant="none", sub_block=space["ffn"]["none"])
    layers = [
        {slot: replace(choice, precision="fp8" if (n, slot) in FP8 else "bf16") for slot, choice in layer.items()}
        for n, layer in enumerate(layers)
    ]
    costs = {**solved.costs, "precision": "bf16"}
    found = replace(solved, layers=tuple(layers), kv_dtype="bf16", costs=costs)
    write_architecture(own_library / "solution" / "architecture.json", found)
    return found


def by_hand(child) -> None:
    """The weights of FP8 rounded in place, the rest in bf16."""
    for layer, slot, part in child.parts():
        for parameter in part.parameters():
            quantised = parameter.ndim == 2 and (layer, slot) in FP8
            parameter.data = rounded(parameter.data) if quantised else parameter.data.bfloat16().float()
    for parameter in (child.embedding.weight, child.norm.weight):
        parameter.data = parameter.data.bfloat16().float()


def test_one_checkpoint(precise, own_library, tmp_path):
    export(open_source(own_library, own_library / "solution"), tmp_path / "child")
    stored = load_file(tmp_path / "child/model.safetensors")
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    matrices = {
        name
        for name, tensor in stored.items()
        if tensor.ndim == 2 and name.startswith("model.layers.") and not name.endswith("_scale")
    }
    said = json.loads((tmp_path / "child/config.json").read_text())["quantization_config"]
    ignored = {f"{name}.weight" for name in said["ignore"]} - {"lm_head.weight"}
    assert ignored == matrices - quantised
    assert {f"{name}_scale" for name in quantised} == {name for name in stored if name.endswith("_scale")}
    assert all(stored[name].dtype == torch.bfloat16 for name in ignored)
    assert {tuple(name.split(".")[2:4]) for name in ignored} == {("0", "mlp"), ("1", "self_attn"), ("2", "self_attn")}
    fused = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    for layer in range(4):
        for names in fused:
            assert (
                len(
                    {
                        name in quantised
                        for name in matrices
                        if f"layers.{layer}." in name and name.split(".")[-2] in names
                    }
                )
                <= 1
            )
    wanted = open_child(str(own_library / "solution")).load(torch.device("cpu"), torch.float32)
    by_hand(wanted)
    found = load_model(tmp_path / "child")(IDS)
    assert (found - wanted(IDS)).abs().max() < 1e-4 * found.std()
    card = (tmp_path / "child/README.md").read_text()
    assert "but for layers 0 ffn, 1 attention, 2 attention, is float8_e4m3fn" in card
    assert "parent bf16; child 4 of 7 sub-blocks fp8, cache bf16" in card
    again = export(open_source(tmp_path / "child"), tmp_path / "again")
    assert again.dtype == "fp8"
    twice = load_file(tmp_path / "again/model.safetensors")
    for name, tensor in stored.items():
        same = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        assert name.endswith("_scale") or torch.equal(same, twice[name].view(same.dtype)), name
    export(open_source(tmp_path / "child"), tmp_path / "whole", dtype="bfloat16")
    assert "quantization_config" not in json.loads((tmp_path / "whole/config.json").read_text())
    export(open_source(tmp_path / "child"), tmp_path / "all", dtype="fp8")
    for name, other in (("child", False), ("again", False), ("whole", True), ("all", True)):
        assert ("other precisions than those" in (tmp_path / name / "README.md").read_text()) == other, name
    assert json.loads((tmp_path / "all/config.json").read_text())["quantization_config"]["ignore"] == ["lm_head"]


def test_lowered(precise, own_library, tmp_path):
    """A linear attention in bf16 is the FFN of a layer put before, in bf16 too."""
    export(open_source(own_library, own_library / "solution"), tmp_path / "child", engine="vllm")
    stored = load_file(tmp_path / "child/model.safetensors")
    said = json.loads((tmp_path / "child/config.json").read_text())["quantization_config"]["ignore"]
    matrices = {
        name.removesuffix(".weight")
        for name, t in stored.items()
        if t.ndim == 2 and t.dtype == torch.bfloat16 and ".layers." in name
    }
    assert set(said) == matrices | {"lm_head"}
    assert {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"} <= set(said)
    assert "model.layers.2.mlp.gate_proj" not in said
    export(open_source(own_library, own_library / "solution"), tmp_path / "plain")
    found, wanted = (load_model(tmp_path / name)(IDS) for name in ("child", "plain"))
    assert (found - wanted).abs().max() < 1e-3 * wanted.std()


def test_in_transformers(precise, own_library, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    export(open_source(own_library, own_library / "solution"), tmp_path / "child")
    dense = CompressedTensorsConfig(dequantize=True)
    options = {"trust_remote_code": True, "dtype": torch.float32, "quantization_config": dense}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "child", **options)
    with torch.no_grad():
        theirs, ours = model(IDS).logits, load_model(tmp_path / "child")(IDS)
    assert (theirs - ours).abs().max() < 1e-5 * ours.std()


def test_on_a_gpu_it_runs_as_solved(precise, own_library, tmp_path, puzzle, one_line_error):
    """What a runtime there is asked for; a CPU has none, and one that was rewritten is no longer what was solved for."""
    export(open_source(own_library, own_library / "solution"), tmp_path / "child")
    cuda, wanted = torch.device("cuda"), Fp8(weights=frozenset(FP8), cache=False)
    for one in (of_checkpoint(str(tmp_path / "child")), open_child(str(own_library / "solution"))):
        assert one.fp8(cuda) == wanted
        assert one.fp8(torch.device("cpu")) is None
    assert replace(of_checkpoint(str(tmp_path / "child")), solved=None).fp8(cuda) is None
    export(open_source(own_library, own_library / "solution"), tmp_path / "vllm", engine="vllm")
    with pytest.raises(Exception, match=r"vllm has other layers than its architecture.json"):
        of_checkpoint(str(tmp_path / "vllm")).fp8(cuda)
    one_line_error(
        puzzle("export", tmp_path / "vllm", "--out", tmp_path / "again"),
        "fused or rewritten since: pass the --dtype of all weights",
    )
    done = puzzle(
        "bench",
        tmp_path / "child",
        "--gpu",
        "cpu",
        "--input-len",
        8,
        "--output-len",
        4,
        "--batch",
        1,
        "--repeats",
        1,
        "--json",
    )
    assert json.loads(done.stdout)["precision"] == "float32"
    one_line_error(
        puzzle("bench", own_library / "solution", "--gpu", "h100", "--engine", "vllm"),
        "solved for parent bf16; child 4 of 7 sub-blocks fp8, cache bf16, and random weights have one precision: pass --fp8",
    )


def test_the_cache_in_fp8(precise, own_library, corpus, tmp_path, puzzle, one_line_error):
    write_architecture(own_library / "solution" / "architecture.json", replace(precise, kv_dtype="fp8"))
    words = ("export", own_library, own_library / "solution", "--out", tmp_path / "child")
    one_line_error(puzzle(*words), "cache fp8: pass --kv-dtype fp8 with --data, or the --dtype of all weights")
    assert not (tmp_path / "child").exists()
    done = puzzle(*words, "--kv-dtype", "fp8", "--data", corpus)
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "child/config.json").read_text())["quantization_config"]
    assert said["kv_cache_scheme"] is not None
    assert len(said["ignore"]) > 1
    stored = load_file(tmp_path / "child/model.safetensors")
    structure = open_model(tmp_path / "child").structure
    cached = [n for n, layer in enumerate(structure.layers) if isinstance(layer["attention"], Gqa)]
    assert {f"model.layers.{n}.self_attn.{letter}_scale" for n in cached for letter in "kv"} <= stored.keys()


@pytest.mark.parametrize("engine", ["llama.cpp", "mlx", "tensorrt-llm"])
def test_engines_without_fp8(precise, own_library, tmp_path, puzzle, one_line_error, engine):
    words = ("export", own_library, own_library / "solution", "--out", tmp_path / "child", "--engine", engine)
    one_line_error(
        puzzle(*words),
        "4 of 7 sub-blocks fp8",
        f"{engine} reads no fp8",
        "or pass the --dtype of all weights",
    )
    assert not (tmp_path / "child").exists()
    if engine != "mlx":  # which takes no linear attention
        assert puzzle(*words, "--dtype", "bfloat16").exit_code == 0


def test_it_heals(precise, own_library, corpus, tmp_path, puzzle, parent):
    """In bf16, from what the weights are worth; its export is again in the precisions that were solved for."""
    export(open_source(own_library, own_library / "solution"), tmp_path / "child")
    words = (
        "--data",
        corpus,
        "--tokens",
        512,
        "--seq-len",
        32,
        "--batch-size",
        4,
        "--validation-sequences",
        2,
        "--device",
        "cpu",
    )
    done = puzzle("heal", tmp_path / "child", "--teacher", parent, *words, "--out", tmp_path / "healed")
    assert done.exit_code == 0, done.output
    assert read_architecture(tmp_path / "healed").kv_dtype == "bf16"
    assert all(t.dtype != torch.float8_e4m3fn for t in load_file(tmp_path / "healed/model.safetensors").values())
    assert export(open_source(tmp_path / "healed"), tmp_path / "served").dtype == "fp8"
    stored = load_file(tmp_path / "served/model.safetensors")
    assert {
        (int(n.split(".")[2]), {"self_attn": "attention", "mlp": "ffn"}[n.split(".")[3]])
        for n, t in stored.items()
        if t.dtype == torch.float8_e4m3fn
    } == FP8


def test_nothing_there_has_no_precision(precise):
    gone = [c for layer in precise.layers for c in layer.values() if isinstance(c.sub_block, NoOp)]
    assert len(gone) == 1
    assert precise.precision == "parent bf16; child 4 of 7 sub-blocks fp8, cache bf16"
