"""An exported child read back: the same KL as before the export, in every format that `puzzle evaluate` opens."""

import json

import pytest
import torch

from puzzle.base.errors import UserError
from puzzle.data.packing import load_tokens
from puzzle.export.sources import child_of_checkpoint
from puzzle.library.assemble import assemble
from puzzle.library.manifest import Library
from puzzle.parents.opened import open_model
from puzzle.runtime.divergence import compare
from puzzle.runtime.model import load_model

LAYERS = [
    {"attention": "kv1", "ffn": "0.5"},
    {"attention": "none", "ffn": "linear"},
    {"attention": "parent", "ffn": "parent"},
    {"attention": "linear", "ffn": "none"},
]
EVALUATION = ("--sequences", 8, "--seq-len", 64)


@pytest.fixture(scope="module")
def solution(solved_as):
    return solved_as(LAYERS)


@pytest.fixture(scope="module")
def before(library, parent, corpus):
    """(KL of the child as assembled from the library, its logits of the first sequence)"""
    opened = open_model(parent)
    tokens = load_tokens([str(corpus)], opened.directory, seq_len=64, num_train=1, num_validation=8).validation
    child = assemble(Library.open(library), LAYERS, opened)
    with torch.no_grad():
        return compare(load_model(opened), child, tokens)["kl"], child(tokens[:1]), tokens[:1]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ([], 0.0),
        (["--format", "nemotron-nas", "--engine", "tensorrt-llm"], 1e-7),  # padded with zero channels: other sums
        (["--format", "nemotron-nas", "--engine", "vllm"], 1e-6),  # linear parts become SwiGLUs
        (["--dtype", "bfloat16"], 1e-3),
        (["--format", "nemotron-nas", "--dtype", "bfloat16"], 1e-3),
    ],
    ids=["hf", "nemotron-nas", "lowered for vllm", "hf bfloat16", "nemotron-nas bfloat16"],
)
def test_the_same_kl_as_before(options, tolerance, library, solution, parent, corpus, before, tmp_path, puzzle):
    done = puzzle("export", library, solution, *options, "--out", tmp_path / "child")
    assert done.exit_code == 0, done.output
    done = puzzle("evaluate", parent, tmp_path / "child", "--data", corpus, *EVALUATION, "--no-speed", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["child"]["kl"]
    assert before[0] > 0.01
    assert abs(found - before[0]) <= tolerance


def test_nemotron_nas_of_exact_widths_is_the_same_to_the_bit(tiny, tiny_checkpoint, tmp_path, puzzle):
    ids = torch.randint(0, tiny.VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    for name in ("kv-heads", "window", "odd-widths", "no-attention-middle", "llama3-rope"):
        source = tiny_checkpoint(name)
        done = puzzle("export", source, "--engine", "vllm", "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        with torch.no_grad():
            assert torch.equal(load_model(source)(ids), load_model(tmp_path / name)(ids))
        first, again = child_of_checkpoint(source), child_of_checkpoint(tmp_path / name)
        assert [(layer.attention, layer.ffn) for layer in first.layers] == [(x.attention, x.ffn) for x in again.layers]


def test_what_is_said_of_other_nemotrons(tmp_path, tiny, tiny_checkpoint, puzzle):
    done = puzzle("export", tiny_checkpoint("linear-ffn"), "--engine", "mlx", "--out", tmp_path / "mlx")
    assert done.exit_code == 0, done.output
    with pytest.raises(UserError, match=r"was written for mlx.*`format` hf"):
        open_model(tmp_path / "mlx")
    done = puzzle("export", tiny_checkpoint("kv-heads"), "--format", "nemotron-nas", "--out", tmp_path / "broken")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    config["block_configs"][1]["attention"]["window_length"] = 4096
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="window_length = 4096 is not supported"):
        open_model(tmp_path / "broken")
    del config["block_configs"][1]["ffn"]
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"broken block_configs \(KeyError\('ffn'\)\): export it again"):
        open_model(tmp_path / "broken")
