import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_children


def pytest_generate_tests(metafunc):
    """A test that asks for `name` runs once for each of the twelve, and for the one of low rank."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [*tiny_children.CHILDREN, *tiny_children.LOW_RANK])


@pytest.fixture(scope="session")
def tiny():
    """benchmarks/lib/tiny_children.py: the twelve children that the matrix of engines uses too."""
    return tiny_children


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny):
    """`tiny_checkpoint(name)`: the directory of one of the twelve as `--format hf` writes it. Not to be changed."""
    root = tmp_path_factory.mktemp("tiny")

    def directory(name: str) -> Path:
        return root / name if (root / name).is_dir() else tiny.write_tiny_child(name, root / name)

    return directory


@pytest.fixture(scope="session")
def solved_as(tmp_path_factory, puzzle, library):
    """`solved_as(layers)`: the directory of an architecture.json with these variants in place of what the solver chose."""
    from puzzle.library.manifest import Library
    from puzzle.measure.architecture import Choice, read_architecture, write_architecture

    spaces = Library.open(library).spaces

    def directory(layers: list[dict[str, str]]) -> Path:
        out = tmp_path_factory.mktemp("solution")
        options = ("--gpu", "cpu", "--throughput", "1.2x", "--input-len", 16, "--output-len", 16, "--out", out)
        done = puzzle("solve", library, *options)
        assert done.exit_code == 0, done.output
        chosen = tuple(
            {s: Choice(variant=v, sub_block=space[s][v], precision="float32") for s, v in layer.items()}
            for layer, space in zip(layers, spaces, strict=True)
        )
        write_architecture(out / "architecture.json", replace(read_architecture(out), layers=chosen))
        return out

    return directory


@pytest.fixture(scope="session")
def child_logits():
    return naive_logits


def naive_logits(child, ids: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits [B, T, V] of a `Child`, written down as plainly as possible, all in one dtype. Default RoPE only."""
    from puzzle.blocklib.gqa import Gqa
    from puzzle.blocklib.linear import Linear
    from puzzle.blocklib.none import NoOp

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + child.around.norm_eps) * weight

    def rotate(x):
        half = x.shape[-1] // 2
        theta = child.around.ropes["default"].parameters["rope_theta"]
        angle = torch.arange(x.shape[2], dtype=dtype)[:, None] / theta ** (torch.arange(half, dtype=dtype) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def attention(x, gqa, w):
        def heads(letter):
            out = F.linear(x, w[f"{letter}_proj.weight"], w.get(f"{letter}_proj.bias"))
            return out.unflatten(-1, (-1, gqa.head_dim)).transpose(1, 2)

        groups = gqa.num_attention_heads // gqa.num_key_value_heads
        q, k, v = rotate(heads("q")), rotate(heads("k")).repeat_interleave(groups, 1), heads("v")
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        seen = (distance >= 0) & (distance < (gqa.window or x.shape[1]))
        scores = (q @ k.transpose(-1, -2) / gqa.head_dim**0.5).masked_fill(~seen, float("-inf"))
        out = (scores.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)
        return F.linear(out, w["o_proj.weight"], w.get("o_proj.bias"))

    def ffn(x, w):
        gate = F.linear(x, w["gate_proj.weight"], w.get("gate_proj.bias"))
        up = F.linear(x, w["up_proj.weight"], w.get("up_proj.bias"))
        return F.linear(F.silu(gate) * up, w["down_proj.weight"], w.get("down_proj.bias"))

    x = child.read_embedding().to(dtype)[ids]
    for layer in child.layers:
        for slot, sub_block in layer.slots.items():
            w = {key: value.to(dtype) for key, value in layer.read(slot).items()}
            assert {key: tuple(value.shape) for key, value in w.items()} == sub_block.tensors()
            if isinstance(sub_block, NoOp):
                continue
            n = norm(x, w["norm.weight"])
            if isinstance(sub_block, Linear):
                matrices = ("linear.weight",) if sub_block.rank is None else ("linear.v.weight", "linear.u.weight")
                for matrix in matrices:
                    n = n @ w[matrix].T
                x = x + n
            else:
                x = x + (attention(n, sub_block, w) if isinstance(sub_block, Gqa) else ffn(n, w))
    return norm(x, child.read_final_norm().to(dtype)) @ child.read_head().to(dtype).T


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """A cache of remote code for this test alone: transformers reads the variables once, when it is imported."""
    cache = tmp_path / "hf" / "modules"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    # transformers appends the cache to sys.path; a package in another test's cache would hide this one
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not Path(entry, "transformers_modules").is_dir()])
    forget_remote_code()
    yield cache
    forget_remote_code()  # which else would be looked for in this cache by tests that have another


def forget_remote_code():
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refused_but_written_as_hf(tmp_path):
    """`check(source, format, message, ids)`: the format refuses the child in one line and writes nothing; written as hf, transformers computes
    and generates from ids [B, T] what we do."""
    from transformers import AutoModelForCausalLM

    from puzzle.base.errors import UserError
    from puzzle.export.write import export
    from puzzle.parents.opened import open_model
    from puzzle.runtime.model import load_model

    def check(source, format: str, message: str, ids: Tensor) -> None:
        with pytest.raises(UserError, match=message) as caught:
            export(source, tmp_path / "stock", format=format)
        assert "\n" not in str(caught.value)
        assert "write `format` hf" in str(caught.value)
        assert not (tmp_path / "stock").exists()
        out, given = export(source, tmp_path / "ours").out, ids.shape[1]
        child = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
        ours = load_model(out)
        assert open_model(out).structure == source.child.structure
        assert (child(ids).logits - ours(ids)).abs().max() <= 1e-4
        found = child.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=1)
        for _ in range(9):
            ids = torch.cat((ids, ours(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(found[:, given:], ids[:, given:])

    return check
