"""`puzzle build-library` and `score` on bad input: each gets one line that says what was wrong, the value and the fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch


def broken_parent(parent: Path, tmp_path: Path, damage: str, poison) -> Path:
    copy = tmp_path / "parent"
    shutil.copytree(parent, copy)
    config = json.loads((copy / "config.json").read_text())
    weight = "model.layers.1.mlp.up_proj.weight"
    if damage == "missing":
        shutil.rmtree(copy)
    elif damage == "no config":
        (copy / "config.json").unlink()
    elif damage == "bad json":
        (copy / "config.json").write_text("{oops")
    elif damage == "unsupported":
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    elif damage == "no weights":
        (copy / "model.safetensors").unlink()
    elif damage == "weight missing":
        poison(copy, weight, lambda t: None)
    elif damage == "wrong shape":
        poison(copy, weight, lambda t: t[:-1].contiguous())
    elif damage == "nan":
        poison(copy, weight, lambda t: t.index_fill(0, torch.tensor([0]), float("nan")))
    elif damage == "truncated":
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "gelu":
        (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    return copy


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ("missing", ["does not exist", "hub id"]),
        ("no config", ["has no config.json"]),
        ("bad json", ["config.json is not valid JSON"]),
        ("unsupported", ["'lama'", "did you mean 'llama'", "supported: llama, mistral, seed_oss, qwen2, qwen3"]),
        ("no weights", ["no model.safetensors", "save_pretrained"]),
        ("weight missing", ["lacks the weight model.layers.1.mlp.up_proj.weight"]),
        ("wrong shape", ["model.layers.1.mlp.up_proj.weight", "[95, 32]", "[96, 32]"]),
        ("nan", ["model.layers.1.mlp.up_proj.weight", "32 NaN"]),
        ("truncated", ["not a whole safetensors file"]),
        ("gelu", ["hidden_act 'gelu'", "gated FFNs", "silu or gelu_pytorch_tanh"]),
    ],
)
def test_bad_parents(puzzle, one_line_error, poison, parent, corpus, tmp_path, damage, wanted):
    out = tmp_path / "lib"
    done = puzzle(
        "build-library",
        broken_parent(parent, tmp_path, damage, poison),
        "--data",
        corpus,
        "--out",
        out,
        "--seq-len",
        32,
    )
    one_line_error(done, *wanted)
    assert not out.exists()


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda d: [], ["no data", "--data"]),
        (lambda d: ["--data", d / "nowhere"], ["does not exist"]),
        (lambda d: ["--data", d / "empty"], ["no text files"]),
        (lambda d: ["--data", f"{d}/*.nothing"], ["matches no file"]),
        (lambda d: ["--data", d / "blank.txt"], ["every document is empty"]),
        (lambda d: ["--data", d / "short.txt"], ["less than one sequence of 128", "--seq-len"]),
        (lambda d: ["--data", d / "bad.jsonl"], ["line 2 is not JSON"]),
        (lambda d: ["--data", d / "field.jsonl"], ["no text field 'text'", "body", "--text-field"]),
    ],
)
def test_bad_data(puzzle, one_line_error, parent, tmp_path, make, wanted):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("x = 1")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    out = tmp_path / "lib"
    one_line_error(puzzle("build-library", parent, "--out", out, "--seq-len", 128, *make(tmp_path)), *wanted)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--attention", "kv2,kvv1"], ["unknown attention variant 'kvv1'", "did you mean 'kv1'"]),
        (["--attention", "kv3"], ["'kv3'", "divisor of 2"]),
        (["--ffn", "1.5"], ["'1.5'", "above 0 and at most 1"]),
        (["--ffn", "0"], ["'0'", "above 0"]),
        (["--layers", "2-9"], ["'2-9' is outside the parent's layers 0-3"]),
        (["--layers", "a"], ["is no layer or range"]),
        (["--tokens", "many"], ["--tokens many"]),
        (["--seq-len", "4096"], ["longer than the parent's context of 256"]),
        (["--lr", "-1"], ["--lr -1: must be above 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--device", "cuda"], ["no CUDA GPU"]),
        (["--memory-limit", "lots"], ["--memory-limit 'lots' is no amount of memory", "80GB"]),
        (["--memory-limit", "1kB"], ["one layer with its variants needs"]),
    ],
)
def test_bad_build_options(puzzle, one_line_error, parent, corpus, tmp_path, arguments, wanted):
    out = tmp_path / "lib"
    size = [] if "--seq-len" in arguments else ["--seq-len", 32]
    one_line_error(puzzle("build-library", parent, "--data", corpus, "--out", out, *size, *arguments), *wanted)
    assert not out.exists()


def test_library_of_another_parent(puzzle, one_line_error, poison, own_library, parent, corpus, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    poison(other, "model.norm.weight", lambda t: t + 1)
    done = puzzle("build-library", other, "--data", corpus, "--out", own_library, "--seq-len", 32)
    one_line_error(done, "built from another parent", "use another --out")
    done = puzzle("score", own_library, "--data", corpus, "--parent", other)
    one_line_error(done, "built from another parent", "--parent")


def test_disk_full_in_the_middle_keeps_what_was_complete(puzzle, one_line_error, parent, corpus, tmp_path, monkeypatch):
    """The tenth block cannot be written; the blocks before it stay, and the next run completes the library."""
    import errno

    from puzzle.library import store

    written = []
    real = store.save_file

    def full(tensors, path, metadata=None):
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        real(tensors, path, metadata)

    monkeypatch.setattr(store, "save_file", full)
    arguments = (
        "build-library",
        parent,
        "--data",
        corpus,
        "--out",
        tmp_path / "lib",
        "--tokens",
        512,
        "--seq-len",
        32,
        "--batch-size",
        4,
        "--no-score",
    )
    one_line_error(puzzle(*arguments), "disk full", "run the same command again")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "lib").rglob("blocks/**/*.json")}
    assert len(kept) == 9
    assert not list((tmp_path / "lib").rglob("*.tmp"))
    monkeypatch.setattr(store, "save_file", real)
    assert puzzle(*arguments).exit_code == 0
    assert all(p.stat().st_mtime_ns == then for p, then in kept.items())


def test_a_directory_of_something_else_is_refused(puzzle, one_line_error, parent, child, corpus, tmp_path):
    """Nothing is written into it, also by a dry run's words; costs that were measured before the library are none of that."""
    place = shutil.copytree(child, tmp_path / "child")
    before = sorted(path.name for path in place.iterdir())
    for more in ([], ["--dry-run"]):
        done = puzzle("build-library", parent, "--data", corpus, "--out", place, *more)
        one_line_error(done, "and no library (no library.json): choose another directory")
    assert sorted(path.name for path in place.iterdir()) == before
    (tmp_path / "lib" / "costs").mkdir(parents=True)
    assert (
        puzzle(
            "build-library", parent, "--data", corpus, "--seq-len", 32, "--out", tmp_path / "lib", "--dry-run"
        ).exit_code
        == 0
    )
