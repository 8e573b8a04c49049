"""Tiny models and libraries, made once a session: hidden 32, four layers, a corpus of a few files."""

from __future__ import annotations

import atexit
import csv
import gc
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start: threads over tiny products wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"  # every model is made here: whether there is a network changes nothing
# What is printed breaks alike, and without colours, whatever the terminal and whoever set these.
os.environ["COLUMNS"] = "80"
os.environ.pop("FORCE_COLOR", None)
# Copies of modeling files: other processes would overwrite them, and what an earlier run has left there is another version's.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="puzzle-tests-")

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
pytest_plugins = ["processes", "example_scripts"]  # in tests/plugins
GPU, VISIBLE = torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES")

# The same examples on every machine, and as long for each as it takes. New ones: pytest --hypothesis-profile search
STEADY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("suite", derandomize=True, database=None, **STEADY)
settings.register_profile("search", **STEADY)
settings.load_profile("suite")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n logical`: one for each core that we may use, also in a container on a host of many, and for each 2 GB of memory."""
    from puzzle.base.machine import available_memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or no limit: "max 100000"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, -(-quota // period))
    return max(1, min(cores, available_memory() // (2 * 10**9)))


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage needs to look at it again."""
    gc.collect()
    gc.freeze()


def no_gpu() -> None:
    raise RuntimeError("No CUDA GPUs are available")


# In place of torch.cuda's. The seeds: torch 2.11 counts the GPUs that are visible when it seeds them, and keeps their number.
NO_GPU = {"is_available": lambda: False, "init": no_gpu, "manual_seed_all": lambda seed: None}
GPU_AGAIN = {name: getattr(torch.cuda, name) for name in NO_GPU}


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu():
    """Whatever the machine has, there is no GPU in this process nor in those that it starts: what tests compare is float32 of a
    CPU, and bf16 of a GPU would be other numbers. Session-wide, since fixtures make libraries and models too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in NO_GPU.items():
            patch.setattr(torch.cuda, name, function)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture
def gpu(on_the_cpu, monkeypatch) -> bool:
    """The machine as it is, for as long as a test lasts: is there a GPU?"""
    for name, function in GPU_AGAIN.items():
        monkeypatch.setattr(torch.cuda, name, function)
    if VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
    torch.cuda.manual_seed_all(0)
    return GPU


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """A fixture that tests share draws the same random numbers, whichever of them is first to ask for it."""
    if fixturedef.scope == "function":
        return (yield)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (yield)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """As if every test was the first."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def marked(request) -> None:
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("gpu")


@pytest.fixture(scope="session", autouse=True)
def timed_reference():
    """What a profile of a CPU times after each part takes longer than a tiny parent's parts: here the machine counts as steady."""
    from puzzle.profile.cpu import CpuTimer

    plain = CpuTimer.reference
    CpuTimer.reference = lambda timer: 1.0
    return plain


def run_cli(*arguments: object) -> Result:
    """`puzzle ...` in this process."""
    from puzzle.cli import main

    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def puzzle():
    return run_cli


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Sixty documents."""
    from made_up_files import write_files

    directory = tmp_path_factory.mktemp("corpus")
    write_files(directory, 60)
    return directory


def save_parent(directory: Path, corpus: Path, **changes) -> Path:
    """A random Llama with a byte-level tokenizer of 384 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([p.read_text() for p in sorted(corpus.glob("*.py"))[:10]], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    values = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**values | changes))
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_parent():
    """`save_parent`, for tests that need a parent of their own."""
    return save_parent


@pytest.fixture(scope="session")
def parent(tmp_path_factory, corpus) -> Path:
    return save_parent(tmp_path_factory.mktemp("models") / "tiny", corpus)


def write_child(parent: Path, out: Path, *, drop: int | None = None) -> Path:
    """No attention in layer 1, half the FFN in layer 2, nothing in layer 3; drop: leave this layer out altogether."""
    from puzzle.blocklib.none import NO_OP
    from puzzle.export.checkpoint import write_checkpoint
    from puzzle.export.hf import hf_config
    from puzzle.export.sources import child_of_checkpoint

    child = child_of_checkpoint(parent)
    layers = list(child.layers)

    def half():
        whole = child.layers[2].read("ffn")
        return {
            "norm.weight": whole["norm.weight"],
            "gate_proj.weight": whole["gate_proj.weight"][:48],
            "up_proj.weight": whole["up_proj.weight"][:48],
            "down_proj.weight": whole["down_proj.weight"][:, :48].contiguous(),
        }

    layers[1] = layers[1].put("attention", NO_OP)
    layers[2] = layers[2].put("ffn", replace(child.ffn, intermediate_size=48), half)
    layers[3] = layers[3].put("attention", NO_OP).put("ffn", NO_OP)
    if drop is not None:
        del layers[drop]
    cut = replace(child, layers=tuple(layers))
    config = hf_config(cut, cut.dtype)
    if drop is not None:
        config["layer_origins"] = [i for i in range(4) if i != drop]
    write_checkpoint(
        out, config=config, tensors=cut.tensors(), tokenizer_from=cut.tokenizer, generation_config=None, card="card"
    )
    return out


@pytest.fixture(scope="session")
def make_child():
    return write_child


@pytest.fixture(scope="session")
def child(tmp_path_factory, parent) -> Path:
    return write_child(parent, tmp_path_factory.mktemp("heal") / "child")


BUILD = (
    "--tokens",
    2048,
    "--seq-len",
    64,
    "--batch-size",
    4,
    "--calibration-sequences",
    8,
    "--validation-sequences",
    4,
    "--score-sequences",
    6,
    "--lr",
    0.003,
)


@pytest.fixture(scope="session")
def build_options():
    return BUILD


@pytest.fixture(scope="session")
def library(tmp_path_factory, parent, corpus) -> Path:
    """The tiny parent's library, built, scored and profiled. Tests that change it must copy it."""
    out = tmp_path_factory.mktemp("libraries") / "lib"
    done = run_cli("build-library", parent, "--data", corpus, "--out", out, *BUILD)
    assert done.exit_code == 0, done.output
    done = run_cli(
        "profile",
        out,
        "--gpu",
        "cpu",
        "--batches",
        "1,4",
        "--prefill",
        "16",
        "--contexts",
        "16,32",
        "--seconds",
        0.005,
        "--rounds",
        1,
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="session")
def deep(tmp_path_factory, corpus) -> Path:
    """A parent of twelve wide layers, whose weights are most of what it takes to run it."""
    sizes = {"hidden_size": 64, "intermediate_size": 768, "num_hidden_layers": 12}
    return save_parent(tmp_path_factory.mktemp("models") / "deep", corpus, **sizes)


@pytest.fixture(scope="session")
def deep_library(tmp_path_factory, deep, corpus) -> Path:
    """Its library, as initialised, without scores. Tests that change it must copy it."""
    out = tmp_path_factory.mktemp("libraries") / "deep"
    sizes = ("--tokens", 0, "--seq-len", 32, "--calibration-sequences", 4, "--validation-sequences", 2)
    offered = ("--attention", "kv1,none", "--ffn", "0.5,none", "--no-score", "--device", "cpu")
    done = run_cli("build-library", deep, "--data", corpus, "--out", out, *sizes, *offered)
    assert done.exit_code == 0, (done.output, done.exception)
    return out


@pytest.fixture(scope="session")
def fake_costs():
    return write_fake_costs


def write_fake_costs(library: Path) -> None:
    """Replace the measured times by round numbers, so that goals have known answers: a unit of time per 1000 weights."""
    from puzzle.blocklib.sub_block import parse_key
    from puzzle.profile.parts import Embedding, Head, Whole

    path = next((library / "costs" / "cpu").glob("*.csv"))
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    kept = [row for row in rows if Whole.parse(row["part"]) is None]
    ends = (Embedding.name, Head.name)
    for row in kept:
        size = 100 if row["part"].split()[0] in ends else parse_key(row["part"]).num_parameters
        tokens = int(row["batch"]) * (int(row["context"]) if row["phase"] == "prefill" else 1)
        row["p50_s"] = (size + 50 / int(row["batch"])) * tokens * 1e-6
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, kept[0])
        writer.writeheader()
        writer.writerows(kept)


@pytest.fixture
def own_library(library, fake_costs, tmp_path) -> Path:
    """A copy that a test may change, with known costs."""
    copy = tmp_path / "lib"
    shutil.copytree(library, copy)
    facts = json.loads((copy / "library.json").read_text())
    facts["parent"]["source"] = os.path.relpath((library / facts["parent"]["source"]).resolve(), copy.resolve())
    (copy / "library.json").write_text(json.dumps(facts))
    fake_costs(copy)
    return copy


@pytest.fixture
def costly(library, fake_costs, tmp_path) -> Path:
    """A library of six pairs per layer where every FFN costs 6 ms a call besides its channels, so that fusion pays."""
    copy = shutil.copytree(library, tmp_path / "lib")
    fake_costs(copy)
    path = next((copy / "costs" / "cpu").glob("*.csv"))
    with open(path, newline="") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        row["p50_s"] = float(row["p50_s"]) + (6e-3 if row["part"].startswith("swiglu ") else 0.0)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    facts = json.loads((copy / "library.json").read_text())
    kept = {"attention": ["none"], "ffn": ["0.5", "0.25"]}
    for slots in facts["layers"].values():
        for slot, names in kept.items():
            slots[slot] = {name: slots[slot][name] for name in names}
    (copy / "library.json").write_text(json.dumps(facts))
    return copy


@pytest.fixture(scope="session")
def one_line_error():
    return check_one_line_error


def check_one_line_error(done: Result, *wanted: str) -> None:
    """Exit code 2, no traceback, one line on standard error that holds every wanted text."""
    assert done.exit_code == 2, (done.output, done.exception)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for text in wanted:
        assert text in errors[0], errors[0]


@pytest.fixture(scope="session")
def poison():
    return poison_tensor


def poison_tensor(checkpoint: Path, name: str, edit) -> None:
    """Rewrite one tensor of a single-file checkpoint: edit(tensor) -> tensor, or None to drop it."""
    from safetensors.torch import load_file

    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    value = edit(tensors.pop(name))
    if value is not None:
        tensors[name] = value
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """`synthetic(name)`: a library of a well-known parent with made-up scores. Tests that change it must copy it."""
    from synthetic_library import main

    root = tmp_path_factory.mktemp("synthetic")

    def library(name: str) -> Path:
        if not (root / name).is_dir():
            done = CliRunner().invoke(main, [name, str(root / name)])
            assert done.exit_code == 0, done.output
        return root / name

    return library


@pytest.fixture(scope="session")
def gpu_table():
    """A table of a GPU for a library, by `gpu_seconds`."""
    from made_up_costs import write_gpu_table

    return write_gpu_table


@pytest.fixture(scope="session")
def shared_library():
    from made_up_costs import shares_of

    return shares_of


@pytest.fixture(scope="session")
def gpu_seconds():
    from made_up_costs import seconds_of

    return seconds_of
