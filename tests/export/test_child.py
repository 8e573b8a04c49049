"""The one description of a child: from a library, from a checkpoint, in another dtype, read as a stream."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from puzzle.base.errors import UserError
from puzzle.blocklib.gqa import Gqa
from puzzle.blocklib.linear import Linear
from puzzle.blocklib.none import NO_OP
from puzzle.blocklib.swiglu import SwiGLU
from puzzle.export.checkpoint import write_checkpoint
from puzzle.export.child import with_dtype
from puzzle.export.hf import hf_config
from puzzle.export.sources import child_of_checkpoint, licence_of
from puzzle.export.write import export, open_source
from puzzle.library.manifest import Library
from puzzle.parents.checkpoint import Checkpoint
from puzzle.runtime.model import load_model

LAYERS = [
    {"attention": "kv1", "ffn": "0.5"},
    {"attention": "none", "ffn": "linear"},
    {"attention": "window-128", "ffn": "parent"},
    {"attention": "linear", "ffn": "none"},
]


@pytest.fixture(scope="module")
def solution(solved_as):
    return solved_as(LAYERS)


def test_child_of_a_library(library, solution, parent):
    child = open_source(library, solution).child
    heads = Gqa(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    gated, linear = SwiGLU(hidden_size=32, intermediate_size=96), Linear(hidden_size=32)
    assert [(layer.attention, layer.ffn) for layer in child.layers] == [
        (replace(heads, num_key_value_heads=1), replace(gated, intermediate_size=48)),
        (NO_OP, linear),
        (replace(heads, window=128), gated),
        (linear, NO_OP),
    ]
    assert (child.hidden_size, child.vocab_size, child.attention.head_dim, child.tied) == (32, 384, 8, True)
    assert (child.name, child.parent_name, child.dtype) == ("tiny", "tiny", torch.float32)
    assert child.around.ropes["default"].parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert child.tokenizer == parent
    tensors = dict(child.tensors())
    assert sum(tensor.numel() for tensor in tensors.values()) == child.num_parameters
    for layer in child.layers:
        for slot, sub_block in layer.slots.items():
            assert {k: tuple(v.shape) for k, v in layer.read(slot).items()} == sub_block.tensors()
    theirs = load_file(parent / "model.safetensors")
    same = {name for name, tensor in tensors.items() if name in theirs and torch.equal(tensor, theirs[name])}
    assert {"model.embed_tokens.weight", "model.layers.2.mlp.up_proj.weight"} <= same
    assert hf_config(child, child.dtype)["per_layer_config"] == {
        "0": {"num_key_value_heads": 1, "intermediate_size": 48},
        "1": {"skip": ["attention"], "linear": ["mlp"]},
        "2": {"sliding_window": 128},
        "3": {"linear": ["attention"], "skip": ["mlp"]},
    }
    assert child.kv_elements_per_token == 2 * 8 * (1 + 2)


def test_from_library_to_checkpoint_and_on(library, solution, tmp_path, puzzle):
    """A child read back from disk is the child that was written, and exports to the same bytes."""
    done = puzzle("export", library, solution, "--out", tmp_path / "first", "--licence", "mit")
    assert done.exit_code == 0, done.output
    first = open_source(library, solution).child
    again = child_of_checkpoint(tmp_path / "first")
    assert (again.parent_name, again.licence) == ("tiny", "mit")
    mine, theirs = dict(first.tensors()), dict(again.tensors())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert again.structure == first.structure
    assert again.base == first.base
    assert hf_config(again, again.dtype) == hf_config(first, first.dtype)
    done = puzzle("export", tmp_path / "first", "--out", tmp_path / "second")
    assert done.exit_code == 0, done.output
    for file in ("config.json", "model.safetensors", "architecture.json", "tokenizer.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_parent_is_a_child_too(parent):
    child = child_of_checkpoint(parent)
    assert hf_config(child, child.dtype)["per_layer_config"] == {}
    heads = Gqa(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    assert {layer.attention for layer in child.layers} == {heads}
    assert dict(child.tensors()).keys() == {name for name, _ in load_model(parent).named_weights()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype, tiny_checkpoint, tmp_path):
    source = open_source(tiny_checkpoint("linear-ffn"))
    done = export(source, tmp_path / "child", dtype=dtype)
    written = load_file(done.out / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    assert json.loads((done.out / "config.json").read_text())["dtype"] == dtype == done.dtype
    for name, tensor in source.child.tensors():
        assert torch.equal(written[name], tensor.to(getattr(torch, dtype)))


def test_float16_overflow_is_said(tiny):
    child = tiny.tiny_child("kv-heads")
    child = with_dtype(replace(child, read_final_norm=lambda: torch.full((256,), 1e5)), torch.float16)
    with pytest.raises(UserError, match=r"float16: a weight of kv-heads exceeds its range of 65504: use bfloat16"):
        child.read_final_norm()


def test_streaming_reads_what_is_there(tiny_checkpoint, tmp_path, poison):
    copy = shutil.copytree(tiny_checkpoint("kv-heads"), tmp_path / "copy")
    stream, whole = Checkpoint(copy), load_file(copy / "model.safetensors")
    assert stream.names == whole.keys()
    assert all(torch.equal(stream.tensor(name), tensor) for name, tensor in whole.items())
    assert stream.dtype("model.norm.weight") == torch.float32
    with pytest.raises(UserError, match="lacks the weight nothing"):
        stream.tensor("nothing")
    poison(copy, "model.norm.weight", lambda t: t.index_fill(0, torch.tensor([3, 5]), float("nan")))
    with pytest.raises(UserError, match=r"model.norm.weight in .* has 2 NaN or infinite values"):
        Checkpoint(copy).tensor("model.norm.weight")


def test_the_licence_is_found(tmp_path):
    assert licence_of(tmp_path) is None
    for text, wanted in (
        ("---\nlicense: llama3.1\ntags: [x]\n---\n# A", "llama3.1"),
        ("# A\n---\nlicense: mit\n---\n", None),
        ("---\n- a\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
    ):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) == wanted


def test_wrong_sources(library, solution, tiny_checkpoint, tmp_path, puzzle):
    child = tiny_checkpoint("kv-heads")
    for arguments, message in (
        ((library,), "is a library: say which child of it"),
        ((child, solution), "library.json does not exist"),
        ((child, "--parent", child), "--parent belongs to a library"),
        ((tmp_path / "nowhere",), "does not exist"),
        ((child, "--dtype", "int8"), "--dtype int8 with --format hf: known: float32, bfloat16, float16"),
        ((child, "--dtype", "q8_0"), "--dtype q8_0 with --format hf"),
        ((child, "--engine", "vlm"), "unknown engine 'vlm': did you mean 'vllm'?"),
        ((child, "--measured", tmp_path / "none.json"), "cannot be read"),
        ((child, "--push-to-hub", "child"), "--push-to-hub child: write it as NAME/MODEL"),
        ((child, "--push-to-hub", "me/child"), "--push-to-hub me/child: the hub does not know who you are"),
    ):
        done = puzzle("export", *arguments, "--out", tmp_path / "out")
        assert done.exit_code == 2, done.output
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from puzzle.export import write
from puzzle.export.child import Child
source, out, format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
real = Child.tensors
def tensors(self):
    for number, item in enumerate(real(self)):
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield item
Child.tensors = tensors
write.export(write.open_source(source), out, format=format, force=True, max_shard_bytes=500_000)
"""


@pytest.mark.parametrize("format", ["hf", "nemotron-nas"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_killed_in_the_middle(format, there, tiny_checkpoint, tmp_path, python):
    """No half checkpoint under the final name; the next export clears what the killed one left."""
    source, out = tiny_checkpoint("kv-heads"), tmp_path / "child"
    if there:
        export(open_source(source), out, format=format)
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else None
    code, _, told = python("-c", KILLED, source, out, format)
    assert code == -signal.SIGKILL, told
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".child.tmp-")]
    assert len(left) == 1
    parts = [path.suffix for path in (tmp_path / left[0]).iterdir()]
    assert len(parts) > 1
    assert set(parts) == {".part"}
    assert ({path.name: path.read_bytes() for path in out.iterdir()} if there else None) == before
    assert out.exists() is there
    export(open_source(source), out, format=format, force=there)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".child")] == []
    assert (out / "manifest.json").is_file()


def test_leftovers_of_others_stay(tmp_path):
    """A running process's directory is left alone; an old checkpoint moved aside by a killed one comes back."""
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    try:
        for name in (
            f".child.tmp-{sleeper.pid}",
            f".child.tmp-{gone.pid}",
            f".child.old-{gone.pid}",
            ".child.tmp-mine",
        ):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(name)
            (tmp_path / name / "manifest.json").write_text('{"files": {}}')
        with pytest.raises(UserError, match="child is not empty"):
            _write(tmp_path / "child")
        assert (tmp_path / "child" / "file").read_text() == f".child.old-{gone.pid}"
        _write(tmp_path / "child", force=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            ["child", f".child.tmp-{sleeper.pid}", ".child.tmp-mine"]
        )
    finally:
        sleeper.kill()
        sleeper.wait()


def _write(out: Path, **options) -> None:
    write_checkpoint(
        out, config={}, tensors=[("a", torch.ones(2))], tokenizer_from=None, generation_config=None, card="", **options
    )


def test_licence_files_come_along(tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint("kv-heads"), tmp_path / "copy")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (copy / name).write_text(name)
    done = export(open_source(copy), tmp_path / "child", format="nemotron-nas")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        assert (done.out / name).read_text() == name


def test_the_library_is_only_read(library, solution, tmp_path):
    times = {path: path.stat().st_mtime_ns for path in Path(library).rglob("*") if path.is_file()}
    time.sleep(0.01)
    export(open_source(library, solution), tmp_path / "child", engine=None)
    assert times == {path: os.stat(path).st_mtime_ns for path in Path(library).rglob("*") if path.is_file()}
    assert Library.open(library).layers == [0, 1, 2, 3]
