"""The checkpoint writer: what it writes loads, and a failure leaves nothing behind."""

import errno
import gc
import hashlib
import json
import os
import signal
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from puzzle.base.errors import UserError
from puzzle.export import checkpoint
from puzzle.export.checkpoint import write_checkpoint
from puzzle.export.modeling_puzzle import PuzzleConfig, PuzzleForCausalLM

CONFIG = {
    "architectures": ["PuzzleForCausalLM"],
    "model_type": "puzzle",
    "auto_map": {
        "AutoConfig": "modeling_puzzle.PuzzleConfig",
        "AutoModelForCausalLM": "modeling_puzzle.PuzzleForCausalLM",
    },
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
    "per_layer_config": {"0": {"skip": ["attention"]}, "2": {"num_key_value_heads": 1, "sliding_window": 4}},
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model():
    torch.manual_seed(0)
    keep = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type", "auto_map", "dtype")}
    return PuzzleForCausalLM(PuzzleConfig(**keep)).eval()


def weights(model):
    return ((name, tensor) for name, tensor in model.state_dict().items() if name != "lm_head.weight")


def write(out, tensors, **changes):
    options = {"config": CONFIG, "tokenizer_from": None, "generation_config": None, "card": "# Child\n"}
    return write_checkpoint(out, tensors=tensors, **{**options, **changes})


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_same_logits(loaded, model):
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_everything_is_written_and_loads(model, tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir()
    copied = [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for name in [*copied, "config.json", "pytorch_model.bin", "model.safetensors", "training_args.json"]:
        (parent / name).write_text(f"parent's {name}")
    out = tmp_path / "deep" / "child"
    manifest = write(
        out,
        weights(model),
        tokenizer_from=parent,
        generation_config={"eos_token_id": [2, 3]},
        extra_json={"architecture.json": {"schema": 1, "layers": []}},
    )

    made = ["README.md", "architecture.json", "config.json", "generation_config.json", "modeling_puzzle.py"]
    made += ["modeling_puzzle_delta.py", "modeling_puzzle_mamba.py", "modeling_puzzle_masks.py"]
    made += ["modeling_puzzle_moe.py", "modeling_puzzle_recurrent.py"]
    assert listing(out) == sorted([*copied, *made, "manifest.json", "model.safetensors"])
    assert listing(out.parent) == ["child"]
    for name in copied:
        assert (out / name).read_text() == f"parent's {name}"
    assert json.loads((out / "config.json").read_text()) == CONFIG
    assert (out / "README.md").read_text() == "# Child\n"

    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["schema"] == 1
    assert sorted(manifest["files"]) == [name for name in listing(out) if name != "manifest.json"]
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    loaded = load(out)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [2, 3]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_logits(loaded, model)


def test_shards_and_index(model, tmp_path):
    limit = 12_000
    write(tmp_path / "child", weights(model), max_shard_bytes=limit)
    index = json.loads((tmp_path / "child" / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in weights(model))
    assert not (tmp_path / "child" / "model.safetensors").exists()
    for file in files:
        with safe_open(tmp_path / "child" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            names = list(shard.keys())
            assert all(index["weight_map"][name] == file for name in names)
            size = sum(shard.get_tensor(name).nbytes for name in names)
        assert size <= limit or len(names) == 1
    assert_same_logits(load(tmp_path / "child"), model)


def test_a_full_header_starts_a_new_shard(tmp_path):
    tensors = {f"layer.{i}." + "x" * 50: torch.full((2,), float(i)) for i in range(3000)}
    write(tmp_path / "child", iter(tensors.items()))
    index = json.loads((tmp_path / "child" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 2
    found = {}
    for file in set(index["weight_map"].values()):
        found |= load_file(tmp_path / "child" / file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_any_dtype_shape_and_layout(tmp_path):
    tensors = {
        "odd": torch.randn(3, 5).bfloat16(),
        "after an odd one": torch.randn(4),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "view": torch.randn(8, 8)[1:5, ::2],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "bool": torch.tensor([True, False, True]),
        "half": torch.randn(3).half(),
        "float8": torch.randn(7).to(torch.float8_e4m3fn),
        "int": torch.arange(5),
    }
    write(tmp_path / "child", iter(tensors.items()))
    found = {}
    for file in (tmp_path / "child").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.detach().double())


def test_tensors_are_not_kept(tmp_path):
    alive = []

    def stream():
        for number in range(20):
            tensor = torch.randn(64, 64)
            alive.append(weakref.ref(tensor))
            yield f"weight.{number}", tensor
            del tensor
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1  # the writer's loop variable

    write(tmp_path / "child", stream())


def failing(model, error):
    stream = list(weights(model))
    yield from stream[:5]
    raise error


@pytest.mark.parametrize("error", [RuntimeError("broken block"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_failure_midway_leaves_no_trace(model, tmp_path, error, there):
    out = tmp_path / "child"
    if there:
        write(out, weights(model))
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else None
    with pytest.raises(type(error)):
        write(out, failing(model, error), force=there, max_shard_bytes=8000)
    assert listing(tmp_path) == (["child"] if there else [])
    if there:
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "disk full while writing"), (errno.EROFS, "cannot write"), (errno.EACCES, "cannot write")],
)
@pytest.mark.parametrize("where", ["add", "close"])
def test_disk_full_and_unwritable(model, tmp_path, monkeypatch, number, message, where):
    def broken(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint._Shard, where, broken)
    with pytest.raises(UserError, match=f"{message} {tmp_path / 'child'}"):
        write(tmp_path / "child", weights(model))
    assert listing(tmp_path) == []


def test_an_error_while_reading_is_not_called_a_write_error(model, tmp_path):
    with pytest.raises(PermissionError):
        write(tmp_path / "child", failing(model, PermissionError(errno.EACCES, "parent's weights")))


def test_killed_midway_leaves_nothing_under_the_final_name(tmp_path, python):
    script = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from puzzle.export.checkpoint import write_checkpoint\n"
        "def tensors():\n"
        "    yield 'a', torch.ones(1000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_checkpoint(Path(sys.argv[1]), config={}, tensors=tensors(), tokenizer_from=None,\n"
        "                 generation_config=None, card='')\n"
    )
    code, _, told = python("-c", script, tmp_path / "child")
    assert code == -signal.SIGKILL, told
    assert not (tmp_path / "child").exists()
    write(tmp_path / "child", iter([("a", torch.ones(3))]))


def test_what_is_there_is_kept_without_force_and_replaced_with_it(model, tmp_path):
    out = tmp_path / "child"
    out.mkdir()
    write(out, weights(model))  # an empty directory is fine
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"child is not empty: .* `force`"):
        write(out, weights(model))
    assert (out / "notes.txt").read_text() == "mine"
    write(out, weights(model), force=True, card="# Second\n")
    assert not (out / "notes.txt").exists()
    assert (out / "README.md").read_text() == "# Second\n"
    assert listing(tmp_path) == ["child"]


def test_a_failed_replacement_brings_the_old_directory_back(model, tmp_path, monkeypatch):
    out = tmp_path / "child"
    write(out, weights(model), card="# First\n")
    rename = os.rename

    def fail_on_the_new_one(source, target):
        if ".tmp-" in str(source):
            raise OSError(errno.EACCES, "denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_on_the_new_one)
    with pytest.raises(UserError, match="cannot write"):
        write(out, weights(model), force=True, card="# Second\n")
    assert (out / "README.md").read_text() == "# First\n"
    assert listing(tmp_path) == ["child"]


def test_bad_arguments(model, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "child"):
        with pytest.raises(UserError, match="file"):
            write(out, weights(model))
    with pytest.raises(UserError, match=r"tokenizer directory .*nowhere does not exist"):
        write(tmp_path / "child", weights(model), tokenizer_from=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="extra_json may not replace"):
        write(tmp_path / "child", weights(model), extra_json={"config.json": {}})
    with pytest.raises(ValueError, match="two tensors are called a"):
        write(tmp_path / "child", iter([("a", torch.ones(2)), ("a", torch.ones(2))]), max_shard_bytes=1)
    with pytest.raises(ValueError, match="no tensors"):
        write(tmp_path / "child", iter([]))
    with pytest.raises(ValueError, match=r"no name for torch\.complex64"):
        write(tmp_path / "child", iter([("a", torch.ones(2, dtype=torch.complex64))]))
    assert listing(tmp_path) == ["file"]


def test_a_link_stays_a_link(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "child").symlink_to(tmp_path / "disk")
    write(tmp_path / "child", weights(model))
    assert (tmp_path / "child").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()


def test_children_of_one_name_do_not_share_code(model, tmp_path, monkeypatch, modules_cache):
    """transformers caches remote code under the directory's last name: each child must still run its own."""
    other = PuzzleForCausalLM(PuzzleConfig(**{**model.config.to_dict(), "per_layer_config": {"1": {"skip": ["mlp"]}}}))
    write(tmp_path / "a" / "child", weights(model))
    changed = tmp_path / "changed.py"
    changed.write_text(checkpoint.MODELING_FILE.read_text() + "\nPuzzleForCausalLM.release = 2\n")
    monkeypatch.setattr(checkpoint, "MODELING_FILE", changed)
    config = {**CONFIG, "per_layer_config": {"1": {"skip": ["mlp"]}}}
    write(tmp_path / "b" / "child", weights(other), config=config)
    (tmp_path / "b" / "child" / "changed.py").rename(tmp_path / "b" / "child" / "modeling_puzzle.py")

    first, second, again = (load(tmp_path / name / "child") for name in "aba")
    assert (hasattr(first, "release"), hasattr(second, "release"), hasattr(again, "release")) == (False, True, False)
    for loaded, expected in ((first, model), (second, other.eval()), (again, model)):
        assert_same_logits(loaded, expected)
    assert modules_cache.is_dir()
    entry = AutoConfig.from_pretrained(tmp_path / "b" / "child", trust_remote_code=True).per_layer_config[1]
    assert entry.skip == ["mlp"]


def test_newer_code_under_the_same_path_is_picked_up(model, tmp_path):
    write(tmp_path / "child", weights(model))
    assert not hasattr(load(tmp_path / "child"), "release")
    code = tmp_path / "child" / "modeling_puzzle.py"
    code.write_text(code.read_text() + "\nPuzzleForCausalLM.release = 3\n")
    assert load(tmp_path / "child").release == 3
