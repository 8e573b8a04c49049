"""`puzzle serve-check`: 0 for an equal export, 1 for another one, 2 for an engine that is not there."""

import json
import shutil
import sys
from shlex import quote

import pytest
import torch
from safetensors.torch import load_file, save_file

from puzzle.base.errors import UserError
from puzzle.serving.check import READS, TEXT, EngineFailed, compare, last_words, serve_check
from puzzle.serving.reference import find_export, load_reference
from tiny_children import write_tiny_child


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """The tiny child "linear-ffn" as `--format hf` writes it."""
    return write_tiny_child("linear-ffn", tmp_path_factory.mktemp("tiny") / "linear-ffn")


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "hf" / "modules"))


@pytest.fixture
def damaged(child, tmp_path):
    """The child with one matrix changed."""
    shutil.copytree(child, tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 1.1
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "damaged"


def test_equal_and_different(child, damaged, puzzle):
    done = puzzle("serve-check", child, "--engine", "hf", "--tokens", 16, "--threads", 1, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["equal"], found["num_same"], found["same_text"]) == (True, 16, True)
    assert found["delta"] <= 1e-5
    assert found["version"].startswith("transformers ")
    done = puzzle("serve-check", damaged, "--engine", "hf", "--reference", child, "--tokens", 16, "--threads", 1)
    assert done.exit_code == 1, done.output
    assert done.stdout.startswith("DIFFERENT: transformers")


def test_an_engine_that_is_not_there(child, tmp_path, puzzle):
    done = puzzle("export", child, "--engine", "mlx", "--out", tmp_path / "mlx")
    assert done.exit_code == 0, done.output
    bare = tmp_path / "python"  # an interpreter without site-packages
    bare.write_text(f'#!/bin/sh\nexec {quote(sys._base_executable)} -I -S "$@"\n')
    bare.chmod(0o755)
    done = puzzle("serve-check", tmp_path / "mlx", "--engine", "mlx", "--python", bare, "--reference", child)
    assert done.exit_code == 2, done.output
    message = " ".join(done.output.split())
    assert "mlx-lm is not installed in" in message
    assert "pip install mlx-lm (on Linux: 'mlx[cpu]' mlx-lm), or give --python" in message
    done = puzzle("serve-check", child, "--engine", "hf", "--python", tmp_path / "nowhere")
    assert done.exit_code == 2
    assert "give the engine's Python interpreter" in " ".join(done.output.split())


def test_a_vllm_without_the_plug_in(child, tmp_path, puzzle):
    (tmp_path / "vllm.py").touch()
    bare = tmp_path / "python"  # an interpreter with vLLM alone
    bare.write_text(f'#!/bin/sh\nPYTHONPATH={quote(str(tmp_path))} exec {quote(sys._base_executable)} -S "$@"\n')
    bare.chmod(0o755)
    done = puzzle("serve-check", child, "--engine", "vllm", "--python", bare)
    assert done.exit_code == 2, done.output
    message = " ".join(done.output.split())
    assert "has no puzzle plug-in, which serves hf exports: install puzzle-nas there" in message
    assert "puzzle export ... --engine vllm" in message


def test_wrong_questions(child, tmp_path, puzzle):
    with pytest.raises(UserError, match=r"`engine` vlm: did you mean 'vllm'"):
        serve_check(child, "vlm")
    for engine in ("llama.cpp", "mlx"):
        assert "hf" not in READS[engine]
        with pytest.raises(UserError, match=f"is a hf export, which .* does not read: .*--engine {engine}"):
            serve_check(child, engine)
    with pytest.raises(UserError, match=r"does not exist: give the directory or the .gguf file"):
        find_export(tmp_path / "nowhere")
    (tmp_path / "half.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        find_export(tmp_path / "half.gguf")
    assert puzzle("serve-check", child, "--engine", "hf", "--tokens", 0).exit_code == 2
    assert puzzle("serve-check", child, "--engine", "hf", "--tokens", 512).exit_code == 2  # the whole context


def test_an_engine_that_fails(child, tmp_path, puzzle):
    shutil.copytree(child, tmp_path / "broken")
    (tmp_path / "broken" / "modeling_puzzle.py").write_text("raise RuntimeError('broken code')\n")
    with pytest.raises(EngineFailed, match=r"transformers failed on .*broken code"):
        serve_check(tmp_path / "broken", "hf", reference=child)
    done = puzzle("serve-check", tmp_path / "broken", "--engine", "hf", "--reference", child)
    assert done.exit_code == 1
    assert "broken code" in done.output
    assert last_words("a\nValueError: no\nbye\n", 1) == "ValueError: no"
    assert last_words("", 9) == "exit code 9"


def test_comparison(child):
    model = load_reference(find_export(child))
    prompt = list(range(2, 34))
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0]
        tokens: list[int] = []
        for _ in range(8):
            tokens.append(int(model(torch.tensor([prompt + tokens]))[0, -1].argmax()))
    same = compare(model, prompt, logits, tokens, 1e-3)
    assert same == {"delta": 0.0, "num_same": 8, "near_tie": False}
    assert (
        compare(model, prompt, logits.log_softmax(-1) + 1, tokens, 1e-3)["delta"] < 1e-5
    )  # a constant changes no log p
    moved = logits.clone()
    moved[3, logits[3].argmin()] += 0.01 * logits.std()
    assert compare(model, prompt, moved, tokens, 1e-3)["delta"] == pytest.approx(0.01, rel=1e-2)
    other = compare(model, prompt, logits, [*tokens[:3], (tokens[3] + 1) % 384, *tokens[4:]], 1e-3)
    assert (other["num_same"], other["near_tie"]) == (3, False)
    lost = compare(model, prompt, torch.full_like(logits, float("nan")), tokens, 1e-3)
    assert lost["delta"] == float("inf")
    with pytest.raises(EngineFailed, match="logits of shape"):
        compare(model, prompt, logits[:, :-1], tokens, 1e-3)
    assert "π" in TEXT
