"""Children exported before transformers 5.24: the model code in their directory is that of commit ca70475 (`before/`).

It hands what it does not know to `**kwargs`, so that from 5.24 on, where generation calls its cache `cache`, it generates
wrong text. Weights and config.json are as today: only the code must be replaced, which `puzzle export OLD --out NEW` does.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

BEFORE = Path(__file__).with_name("before")
RENAMED = tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 24)


@pytest.fixture(params=["hf", "nemotron-nas"])
def old(request, tiny_checkpoint, tmp_path, puzzle):
    """A child without attention in layer 0, with the code of then."""
    done = puzzle("export", tiny_checkpoint("no-attention-first"), "--format", request.param, "--out", tmp_path / "old")
    assert done.exit_code == 0, done.output
    for path in BEFORE.glob("*.py"):
        if (tmp_path / "old" / path.name).is_file():
            shutil.copyfile(path, tmp_path / "old" / path.name)
    return tmp_path / "old"


def generated(directory: Path, **options) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
    ids = torch.randint(2, 384, (1, 16), generator=torch.Generator().manual_seed(0))
    return model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=1, **options)


def test_exported_again_it_generates_what_it_should(old, tmp_path, puzzle):
    wanted = generated(old, use_cache=False)
    assert torch.equal(generated(old), wanted) is not RENAMED
    format = json.loads((old / "config.json").read_text())["model_type"].replace("puzzle", "hf")
    done = puzzle("export", old, "--format", format, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    for path in sorted(old.iterdir()):
        same = path.name not in (p.name for p in BEFORE.iterdir()) and path.name not in ("README.md", "manifest.json")
        assert not same or (tmp_path / "new" / path.name).read_bytes() == path.read_bytes(), path.name
    assert torch.equal(generated(tmp_path / "new"), wanted)


@pytest.mark.parametrize("old", ["hf"], indirect=True)
def test_serve_check_and_evaluate_say_so(old, tmp_path, corpus, puzzle):
    arguments = ("--engine", "hf", "--tokens", 16, "--threads", 1)
    done = puzzle("serve-check", old, *arguments)
    assert done.exit_code == RENAMED, done.output
    assert (f"puzzle export {old} --out NEW" in done.output) is RENAMED
    (old / "modeling_puzzle.py").write_text("raise RuntimeError('code of then')\n")
    done = puzzle("serve-check", old, *arguments)
    assert done.exit_code == 1
    assert f"code of then; {old} carries model code of another puzzle" in done.output
    options = ("--sequences", 2, "--seq-len", 32, "--no-speed", "--json")
    done = puzzle("evaluate", old, old, "--data", corpus, *options)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["child"]["kl"] == 0
    assert f"note: {old} carries model code of another puzzle" in done.stderr
    done = puzzle("export", old, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert puzzle("serve-check", tmp_path / "new", *arguments).exit_code == 0
    done = puzzle("evaluate", old, tmp_path / "new", "--data", corpus, *options)
    assert "another puzzle" not in done.stderr
