"""A fused layer is the parallel sum of its FFNs, on disk and back; origins are kept."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from puzzle.base.errors import UserError
from puzzle.export.sources import child_of_checkpoint
from puzzle.fuse.rewrite import fuse_layers, remove_layers
from puzzle.fuse.stage import fuse_child
from puzzle.runtime.model import load_model


def sibling(name: str):
    spec = importlib.util.spec_from_file_location(f"fuse_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = sibling("conftest")


def contribution(tensors, scale, x, eps=1e-6):
    """FFN(norm(x)), written down plainly in float64. x [T, E]"""
    w = {name: value.double() for name, value in tensors.items()}
    n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale.double()
    gate = F.linear(n, w["gate_proj.weight"], w.get("gate_proj.bias"))
    up = F.linear(n, w["up_proj.weight"], w.get("up_proj.bias"))
    return F.linear(F.silu(gate) * up, w["down_proj.weight"], w.get("down_proj.bias"))


@pytest.mark.parametrize("norm", ["own", "last"])
@pytest.mark.parametrize("length", [2, 3, 16])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_fused_is_the_parallel_sum_through_export_and_reload(parent, tmp_path, norm, length, dtype, limit):
    widths = [7 + 13 * (k % 5) for k in range(length)]
    free = [make.free(width) for width in widths]
    shapes = [make.BLOCK, *free[:1], make.NOTHING, *free[1:], make.BLOCK]
    child = make.random_child(parent, shapes, dtype=dtype, mlp_bias=length == 3)
    source = make.write(child, tmp_path / "child")
    fuse_child(source, tmp_path / "fused", [(1, length + 1)], norm=norm)
    fused = child_of_checkpoint(tmp_path / "fused")
    assert [layer.stands_for for layer in fused.layers] == [0, length + 1, length + 2]
    assert fused.layers[1].ffn.intermediate_size == sum(widths)
    assert fused.dtype == dtype
    x = torch.randn(50, child.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = [layer.read("ffn") for layer in child.layers[1:-1] if not layer.is_empty]
    scales = [part["norm.weight"] if norm == "own" else parts[-1]["norm.weight"] for part in parts]
    expected = sum(contribution(part, scale, x, child.ffn.norm_eps) for part, scale in zip(parts, scales, strict=True))
    wide = fused.layers[1].read("ffn")
    found = contribution(wide, wide["norm.weight"], x, child.ffn.norm_eps)
    assert (found - expected).abs().max() / expected.abs().max() <= limit
    if norm == "own":
        assert torch.equal(wide["norm.weight"], torch.ones(child.hidden_size, dtype=dtype))
    model = load_model(tmp_path / "fused", dtype=dtype)
    with torch.no_grad():
        run = model.blocks[1](x[None].to(dtype), model.ropes(50))[0].double() - x.to(dtype)
    assert (run - expected).abs().max() / expected.abs().max() <= (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_reload_in_transformers_gives_the_same_logits(fusible, tmp_path):
    from transformers import AutoModelForCausalLM

    fuse_child(fusible, tmp_path / "fused", [(1, 3), (5, 8)])
    config = json.loads((tmp_path / "fused/config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_origins"] == [0, 3, 4, 8, 9, 10]
    assert config["per_layer_config"]["1"] == {"skip": ["attention"], "intermediate_size": 160}
    assert "each through its own norm" in (tmp_path / "fused/README.md").read_text()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", trust_remote_code=True).eval()
    ids = torch.randint(2, 384, (2, 19))
    with torch.no_grad():
        ours = load_model(tmp_path / "fused")(ids)
        assert (theirs(ids).logits - ours).abs().max() <= 1e-4
    assert theirs.config.layer_origins == config["layer_origins"]


def test_fusing_again_keeps_origins_and_exports_as_any_child(puzzle, fusible, tmp_path):
    fuse_child(fusible, tmp_path / "once", [(1, 2), (5, 7)])
    assert child_of_checkpoint(tmp_path / "once").layer_origins == [0, 2, 3, 4, 7, 8, 9, 10]
    fuse_child(tmp_path / "once", tmp_path / "twice", [(1, 2)])
    twice = child_of_checkpoint(tmp_path / "twice")
    assert twice.layer_origins == [0, 3, 4, 7, 8, 9, 10]
    assert twice.layers[1].ffn.intermediate_size == 160
    done = puzzle("export", tmp_path / "twice", "--format", "hf", "--out", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert child_of_checkpoint(tmp_path / "again").layer_origins == twice.layer_origins


def test_nothing_is_read_before_the_layer_is(fusible):
    reads = []

    def counted(layer, index):
        def read():
            reads.append(index)
            return layer.read("ffn")

        return layer.put("ffn", layer.ffn, read)

    child = child_of_checkpoint(fusible)
    child = replace(child, layers=tuple(counted(layer, k) for k, layer in enumerate(child.layers)))
    fused = fuse_layers(child, [(1, 3)])
    assert reads == []
    fused.layers[1].read("ffn")
    assert reads == [1, 2, 3]
    smaller = remove_layers(child, [1, 2])
    assert child.layer_origins is None
    assert smaller.layer_origins == [0, *range(3, 11)]
    assert remove_layers(child, [10]).layer_origins == list(range(10))


def test_mixed_dtypes_take_the_wider(parent):
    child = make.random_child(parent, [make.BLOCK, make.free(8), make.free(16), make.BLOCK], dtype=torch.bfloat16)
    other = make.random_child(parent, [make.BLOCK, make.free(8), make.free(16), make.BLOCK])
    mixed = replace(child, layers=(child.layers[0], child.layers[1], other.layers[2], child.layers[3]))
    wide = fuse_layers(mixed, [(1, 2)]).layers[1].read("ffn")
    assert {value.dtype for value in wide.values()} == {torch.float32}
    assert torch.equal(wide["down_proj.weight"][:, 8:], other.layers[2].read("ffn")["down_proj.weight"])


@pytest.mark.parametrize("origins", [[0, 1], [0, 2, 1, *range(3, 11)], "0", [0, -1, *range(2, 11)]])
def test_broken_origins_are_named(fusible, tmp_path, origins):
    import shutil

    copy = shutil.copytree(fusible, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"layer_origins": origins}))
    with pytest.raises(UserError, match="layer_origins"):
        child_of_checkpoint(copy)
